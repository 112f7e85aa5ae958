"""What the gunicorn master holds: the ports, the allotment, who has what."""

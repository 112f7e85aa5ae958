"""A Django site on gunicorn's gthread workers, with its admin and its metrics on ports of their own.

python manage.py migrate
gunicorn wsgi
"""

import os

from django.core.wsgi import get_wsgi_application
from prometheus_client import make_wsgi_app

import gunicorn_passenger as passenger

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
application = get_wsgi_application()


def admin(environ, start_response):
    # no client can set this: its headers are named HTTP_...
    environ["shop.admin"] = True
    return application(environ, start_response)


# With preload_app this runs in the master, and every worker listens after the fork.
passenger.create_server(admin).listen(9400, name="admin")
passenger.create_server(make_wsgi_app(), threads=1).listen(9401, name="metrics")

# gunicorn-passenger in a container, with the seed example as the program.
#
#     docker build -t gunicorn-passenger .
#     docker run -v sockets:/run/app --stop-timeout 35 gunicorn-passenger
#
# The web server in front mounts the same volume and talks to /run/app/app.sock. For a program of your
# own, start from this image, copy the program to /app and give your own command.
#
# Any base will do that has Python 3.10 or later with venv, useradd and CA certificates.
ARG BASE=python:3.13-slim
# What it is built in: the same Python, and a C compiler for gunicorn's HTTP parser in C. Without a compiler
# the image works as well, and answers fewer requests.
ARG BUILD=python:3.13

FROM ${BUILD} AS build
WORKDIR /src
COPY . .
# A venv, because Debian's own Python refuses to have pip install into it. Whoever builds behind an index
# of their own passes pip's configuration as a secret, so that no credentials stay in the image:
#     docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf .
# and, when that index needs it, a CA bundle (cert = /run/secrets/ca.pem in pip.conf) as the secret ca.pem.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python3 -m venv /opt/venv \
    && export PIP_CONFIG_FILE=/run/secrets/pip.conf \
    && /opt/venv/bin/pip install --no-cache-dir . \
    && if command -v gcc; then /opt/venv/bin/pip install --no-cache-dir '.[fast]'; fi

FROM ${BASE}
# Fixed numbers, so that a volume's owner and the web server's group can be named outside the image. The
# directory of the socket lets in its owner and its group; the umask in CMD does the same for the socket.
RUN groupadd --gid 10001 app \
    && useradd --uid 10001 --gid app --create-home --shell /usr/sbin/nologin app \
    && install -d -o app -g app -m 0750 /run/app
COPY --from=build /opt/venv /opt/venv
COPY examples/seed/app.py /app/

WORKDIR /app
USER app
VOLUME /run/app
# The ports that the program may open, and the number of workers where -w does not say otherwise.
# GUNICORN_CMD_ARGS adds gunicorn options; those written in CMD win over it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PASSENGER_PORTS=9000 \
    WEB_CONCURRENCY=4

# gunicorn itself is process 1 and gets the signal; it finishes what it has within --graceful-timeout,
# 30 seconds, so `docker stop` should wait a little longer than that.
STOPSIGNAL SIGTERM
# Workers show that they live by touching a file, which must not wait for a disk: hence /dev/shm.
CMD ["gunicorn", "-k", "gunicorn_passenger.Worker", "-b", "unix:/run/app/app.sock", "--umask", "007", \
     "--worker-tmp-dir", "/dev/shm", "app"]

# gunicorn-passenger in a container, with examples/seed as the program.
#
#     docker build -t gunicorn-passenger .
#     docker run -v sockets:/run/app --stop-timeout 35 gunicorn-passenger
#
# The web server in front mounts the same volume and connects to /run/app/app.sock. For your own program,
# start from this image, copy the program to /app, and set your own command.
#
# Any base image works that has Python 3.10 or later with venv, useradd and CA certificates.
ARG BASE=python:3.13-slim
# The build image: the same Python, and a C compiler for gunicorn's HTTP parser in C. Without a compiler
# the image works, too, but answers fewer requests per second.
ARG BUILD=python:3.13

FROM ${BUILD} AS build
WORKDIR /src
COPY . .
# A venv, because pip refuses to install into Debian's own Python. To build with a package index of your
# own, pass pip's configuration as a secret, so that no credentials stay in the image:
#     docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf .
# If that index needs a CA bundle, pass it as the secret ca.pem (cert = /run/secrets/ca.pem in pip.conf).
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python3 -m venv /opt/venv \
    && export PIP_CONFIG_FILE=/run/secrets/pip.conf \
    && /opt/venv/bin/pip install --no-cache-dir . \
    && if command -v gcc; then /opt/venv/bin/pip install --no-cache-dir '.[fast]'; fi

FROM ${BASE}
# Fixed ids, so that a volume's owner and the web server's group can be named outside the image. The
# socket's directory is open to its owner and group only; the umask in CMD does the same for the socket.
RUN groupadd --gid 10001 app \
    && useradd --uid 10001 --gid app --create-home --shell /usr/sbin/nologin app \
    && install -d -o app -g app -m 0750 /run/app
COPY --from=build /opt/venv /opt/venv
COPY examples/seed/app.py /app/

WORKDIR /app
USER app
VOLUME /run/app
# The ports that the program may open, and the number of workers unless -w sets it.
# GUNICORN_CMD_ARGS adds gunicorn options; those in CMD override it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PASSENGER_PORTS=9000 \
    WEB_CONCURRENCY=4

# gunicorn itself is process 1 and gets the signal. It finishes its requests within --graceful-timeout
# (30 seconds), so `docker stop` should wait a little longer than that.
STOPSIGNAL SIGTERM
# Workers touch a file to show that they are alive. /dev/shm keeps that from waiting for a disk.
CMD ["gunicorn", "-k", "gunicorn_passenger.Worker", "-b", "unix:/run/app/app.sock", "--umask", "007", \
     "--worker-tmp-dir", "/dev/shm", "app"]

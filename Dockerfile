# gunicorn-passenger in a container, with examples/seed as the program.
#
#     docker build -t gunicorn-passenger .
#     docker run -v sockets:/run/app --stop-timeout 35 gunicorn-passenger
#
# The web server in front mounts the same volume and connects to /run/app/app.sock. Your own image needs
# three lines:
#
#     FROM gunicorn-passenger
#     COPY app.py /app/
#     ENV PASSENGER_PORTS=9000
#
# docs/how-to/deployment.md says more: read-only file systems, OpenShift, ports that other containers reach.
#
# Any base image works that has Python 3.10 or later with venv, useradd, apt-get and CA certificates.
ARG BASE=python:3.15-slim

FROM ${BASE} AS build
# gunicorn's HTTP parser in C comes as source, and the package's own modules that each request runs through are
# compiled (docs/reference/http.md). The compiler stays in this stage.
RUN if ! command -v gcc || ! python3 -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))'; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
        && case $(readlink -f "$(command -v python3)") in \
            /usr/bin/*) apt-get install -y --no-install-recommends "$(basename "$(readlink -f "$(command -v python3)")")-dev";; \
        esac; \
    fi
# The environment of the image has no pip: the one in another environment fills it. Packages change less often
# than the code, so they are a layer of their own.
# To build with a package index of your own, pass pip's configuration as a secret, so that no credentials
# stay in the image:
#     docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf .
# If that index needs a CA bundle, pass it as the secret ca.pem (cert = /run/secrets/ca.pem in pip.conf).
WORKDIR /src
COPY constraints.txt .
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv \
    && /opt/pip/bin/pip install setuptools==84.2.1 mypy==2.4.1 \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install -r constraints.txt
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY gunicorn_passenger gunicorn_passenger
RUN GUNICORN_PASSENGER_COMPILE=1 /opt/pip/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /opt/wheel . \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-index --no-deps /opt/wheel/*.whl \
    && /opt/pip/bin/pip --python /opt/venv/bin/python check

FROM ${BASE}
LABEL org.opencontainers.image.title="gunicorn-passenger" \
      org.opencontainers.image.description="gunicorn workers with second servers, and a reverse proxy that joins them" \
      org.opencontainers.image.licenses="MIT"
# A fixed user id, so that a volume's owner can be named outside the image. OpenShift runs the image as any
# user id in group 0, so group 0 owns what the program writes to. The socket's directory is open to its owner
# and group only; the umask in CMD does the same for the socket.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /run/app --shell /usr/sbin/nologin app \
    && install -d -o app -g 0 -m 0770 /run/app
COPY --from=build /opt/venv /opt/venv
COPY examples/seed/app.py /app/

WORKDIR /app
# The ports that the program may open, the directory of the status socket, and the number of workers unless
# -w sets it. GUNICORN_CMD_ARGS adds gunicorn options; those in CMD override it.
# A user id without an account has no home directory, where gunicorn puts its own control socket.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/run/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PASSENGER_PORTS=9000 \
    PASSENGER_RUNTIME_DIR=/run/app/gunicorn-passenger \
    WEB_CONCURRENCY=4
# by number: Kubernetes can then see that it is not root (runAsNonRoot)
USER 10001:0
VOLUME /run/app
EXPOSE 9000

# Healthy while a worker serves. It asks the master, so it responds while all workers are busy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["gunicorn-passenger", "health"]
# gunicorn itself is process 1 and gets the signal. It finishes its requests within --graceful-timeout
# (30 seconds), so `docker stop` should wait a little longer than that.
STOPSIGNAL SIGTERM
# Workers touch a file to show that they are alive. /dev/shm keeps that from waiting for a disk.
CMD ["gunicorn", "-k", "gunicorn_passenger.Worker", "-b", "unix:/run/app/app.sock", "--umask", "007", \
     "--worker-tmp-dir", "/dev/shm", "app"]

/* Load for bench/wsgi.py: one request on every connection, over a UNIX socket.
 *
 *     connect SOCKET CONNECTIONS SECONDS ANSWER
 *
 * keeps so many connections going, each of which asks with "Connection: close" and reads to the end. An answer
 * is good if it begins with a status of 200 and ends with ANSWER. Prints the good ones, the bad ones and the
 * seconds they took.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

struct connection {
    int fd;
    size_t length;
    char answer[4096];
};

static struct sockaddr_un address = {.sun_family = AF_UNIX};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void begin(struct connection *c, int poll)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    c->length = 0;
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail("socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    if (epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &event))
        fail("epoll_ctl");
    if (send(c->fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) != sizeof REQUEST - 1)
        fail("send");
}

/* Read what there is: whether the connection has come to its end. */
static int ended(struct connection *c)
{
    for (;;) {
        ssize_t got = recv(c->fd, c->answer + c->length, sizeof c->answer - c->length, MSG_DONTWAIT);
        if (got <= 0) /* at EAGAIN there is more to come */
            return got == 0 || errno != EAGAIN;
        c->length += got;
    }
}

static int good(const struct connection *c, const char *answer)
{
    size_t length = strlen(answer);
    return c->length > 12 + length && !memcmp(c->answer, "HTTP/1.", 7) && !memcmp(c->answer + 8, " 200", 4)
        && !memcmp(c->answer + c->length - length, answer, length);
}

int main(int argc, char **argv)
{
    if (argc != 5 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    int many = atoi(argv[2]), poll = epoll_create1(EPOLL_CLOEXEC);
    struct connection *all = calloc(many, sizeof *all);
    struct epoll_event *events = calloc(many, sizeof *events);
    if (poll < 0 || !all || !events)
        fail("memory");
    long count[2] = {0, 0};
    double start = now(), end = start + atof(argv[3]);
    for (int i = 0; i < many; i++)
        begin(&all[i], poll);
    while (now() < end) {
        int ready = epoll_wait(poll, events, many, 1000);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!ended(c))
                continue;
            count[good(c, argv[4])]++;
            close(c->fd);
            begin(c, poll);
        }
    }
    printf("%ld %ld %f\n", count[1], count[0], now() - start);
    return 0;
}

/* Load for the benchmarks: clients that reach a server or a proxy over a UNIX socket, and the upstream of a proxy.
 *
 *     traffic connections SOCKET COUNT SECONDS RESPONSE
 *         so many connections at a time, each of which carries one request with "Connection: close" and is read to its
 *         end, where RESPONSE has to be; prints the responses and the seconds
 *     traffic echo SOCKET COUNT SECONDS
 *         WebSockets with one message of 125 bytes in flight each; prints the messages and the seconds
 *     traffic idle SOCKET COUNT
 *         opens WebSockets, carries one message over each, prints "open", waits for the end of its standard input,
 *         carries another message over each and prints "alive"
 *     traffic down SOCKET BYTES SECONDS
 *         asks for /bench/body again and again until the seconds are over; prints the bodies and the seconds
 *     traffic up SOCKET BYTES SECONDS
 *         posts as many bytes to /bench/up, the same way
 *     traffic upstream
 *         serves on a free port of 127.0.0.1, which it prints:
 *         GET /bench/hello   "Hello World!"
 *         POST /bench/sum    adler32 of the body, in decimal
 *         POST /bench/up     the length of the body, which is discarded
 *         GET /bench/echo    a WebSocket that sends the payload of each frame back
 *
 * A client that sees anything but what it expects says so and ends with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* The handshake of RFC 6455, section 1.3: its key, and what has to be accepted for it. */
#define KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

#define PAYLOAD 125
#define HEAD_SIZE 8192
#define CHUNK (256 * 1024)

static char chunk[CHUNK];

static void fail(const char *what, ...)
{
    va_list words;
    va_start(words, what);
    vprintf(what, words);
    va_end(words);
    putchar('\n');
    fflush(stdout);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void *room(size_t count, size_t size)
{
    void *found = calloc(count, size);
    if (!found)
        fail("no memory");
    return found;
}

static void watch(int poll, int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl: %m");
}

/* The end of a message's head in a buffer that ends with a NUL, or NULL. */
static char *end_of_head(char *head)
{
    char *end = strstr(head, "\r\n\r\n");
    return end ? end + 4 : NULL;
}

/* The value of a header, which ends with CR, or NULL. The name is given with the line's end before it and its colon. */
static const char *header(const char *head, const char *name)
{
    const char *line = strcasestr(head, name);
    return line ? line + strlen(name) + strspn(line + strlen(name), " ") : NULL;
}

/* --- the upstream ------------------------------------------------------------------------------------ */

enum state { HEAD, SUM, UP, FRAMES };

struct peer {
    int fd;
    enum state state;
    size_t length; /* of what is in the buffer */
    long size, left; /* of the body */
    uint32_t a, b; /* of its checksum */
    char buffer[HEAD_SIZE + 1];
};

static int say(struct peer *p, const void *what, size_t length)
{
    /* small responses to clients that wait for them: they fit the socket's buffer */
    return send(p->fd, what, length, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)length;
}

static int respond(struct peer *p, const char *status, const char *body)
{
    char text[512];
    int length = snprintf(text, sizeof text, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n%s",
                          status, strlen(body), body);
    return say(p, text, length);
}

static void add_to_body(struct peer *p, const char *data, size_t length)
{
    p->left -= length;
    for (size_t i = 0; p->state == SUM && i < length; i++) {
        p->a = (p->a + (uint8_t)data[i]) % 65521;
        p->b = (p->b + p->a) % 65521;
    }
}

/* Sends back whole frames in the buffer; whether the connection stays. */
static int echo_frames(struct peer *p)
{
    char out[HEAD_SIZE];
    size_t used = 0, filled = 0, size;
    for (; p->length - used >= 2; used += 6 + size) {
        uint8_t *frame = (uint8_t *)p->buffer + used;
        size = frame[1] & 0x7f;
        if (!(frame[1] & 0x80) || size > PAYLOAD || (frame[0] & 0xf) == 8)
            return 0; /* no mask, too long, or the close frame */
        if (p->length - used < 6 + size)
            break;
        out[filled++] = frame[0];
        out[filled++] = (char)size;
        for (size_t i = 0; i < size; i++)
            out[filled++] = frame[6 + i] ^ frame[2 + (i & 3)];
    }
    p->length -= used;
    memmove(p->buffer, p->buffer + used, p->length);
    return !filled || say(p, out, filled);
}

/* Takes the head of a request: whether it is one that is served. */
static int take_head(struct peer *p, const char *body)
{
    const char *length = header(p->buffer, "\r\ncontent-length:");
    const char *key = header(p->buffer, "\r\nsec-websocket-key:");
    size_t early = p->buffer + p->length - body;
    p->size = p->left = length ? atol(length) : 0;
    p->a = 1;
    p->b = 0;
    if (header(p->buffer, "\r\ntransfer-encoding:"))
        return 0;
    if (!strncmp(p->buffer, "GET /bench/hello ", 17)) {
        if (!respond(p, "200 OK", "Hello World!"))
            return 0;
    } else if (!strncmp(p->buffer, "POST /bench/sum ", 16)) {
        p->state = SUM;
    } else if (!strncmp(p->buffer, "POST /bench/up ", 15)) {
        p->state = UP;
    } else if (!strncmp(p->buffer, "GET /bench/echo ", 16) && key && !strncmp(key, KEY "\r", sizeof KEY)) {
        static const char SWITCH[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                                     "Connection: Upgrade\r\nSec-WebSocket-Accept: " ACCEPT "\r\n\r\n";
        p->state = FRAMES;
        if (!say(p, SWITCH, sizeof SWITCH - 1))
            return 0;
    } else {
        return 0;
    }
    if (p->state == SUM || p->state == UP) {
        size_t part = (long)early < p->left ? early : (size_t)p->left;
        add_to_body(p, body, part);
        body += part;
        early -= part;
    }
    memmove(p->buffer, body, early);
    p->length = early;
    return 1;
}

/* Serves what is whole in the buffer; whether the connection stays. */
static int serve(struct peer *p)
{
    while (p->state != FRAMES) {
        if (p->state != HEAD) {
            char text[32];
            if (p->left)
                return 1;
            snprintf(text, sizeof text, "%lu", p->state == SUM ? (unsigned long)p->b << 16 | p->a : (unsigned long)p->size);
            p->state = HEAD;
            if (!respond(p, "200 OK", text))
                return 0;
        }
        p->buffer[p->length] = 0;
        char *body = end_of_head(p->buffer);
        if (!body)
            return p->length < HEAD_SIZE;
        if (!take_head(p, body)) {
            respond(p, "400 Bad Request", "");
            return 0;
        }
    }
    return echo_frames(p);
}

/* Takes what has arrived; whether the connection stays. */
static int take(struct peer *p)
{
    ssize_t got;
    if (p->state == UP || p->state == SUM) {
        size_t wanted = p->left < CHUNK ? (size_t)p->left : CHUNK;
        /* TCP discards with MSG_TRUNC, without a copy */
        got = recv(p->fd, chunk, wanted, MSG_DONTWAIT | (p->state == UP ? MSG_TRUNC : 0));
        if (got > 0)
            add_to_body(p, chunk, got);
    } else {
        got = recv(p->fd, p->buffer + p->length, HEAD_SIZE - p->length, MSG_DONTWAIT);
        if (got > 0)
            p->length += got;
    }
    return got < 0 ? errno == EAGAIN : got && serve(p);
}

static _Noreturn void upstream(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    int poll = epoll_create1(EPOLL_CLOEXEC);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)
        || getsockname(listener, (struct sockaddr *)&address, &size))
        fail("listen: %m");
    watch(poll, listener, NULL);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[64];
        int ready = epoll_wait(poll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct peer *p = events[i].data.ptr;
            if (p) {
                if (!take(p)) {
                    close(p->fd);
                    free(p);
                }
                continue;
            }
            int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd < 0)
                continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            p = room(1, sizeof *p);
            p->fd = fd;
            watch(poll, fd, p);
        }
    }
}

/* --- the clients ------------------------------------------------------------------------------------- */

struct client {
    int fd;
    size_t length; /* of what is in the buffer */
    char buffer[4096];
};

static struct sockaddr_un address = {.sun_family = AF_UNIX};

static int join_at_once(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("connect: %m");
    return fd;
}

/* With limits of time, which would cost too much where every request has a connection of its own. */
static int join(void)
{
    static const struct timeval PATIENCE = {.tv_sec = 20};
    int fd = join_at_once();
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &PATIENCE, sizeof PATIENCE)
        || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &PATIENCE, sizeof PATIENCE))
        fail("setsockopt: %m");
    return fd;
}

static void send_all(int fd, const char *data, size_t length)
{
    while (length) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent < 0)
            fail("send: %m");
        data += sent;
        length -= sent;
    }
}

/* Receives at least a byte; how many. */
static size_t receive(int fd, char *buffer, size_t size)
{
    ssize_t got = recv(fd, buffer, size, 0);
    if (got <= 0)
        fail("the response broke off, or nothing came");
    return got;
}

/* Reads a head; what came behind it is moved to the beginning of the buffer, its length is returned. */
static size_t read_head(int fd, char *buffer, size_t size, char *head)
{
    size_t length = 0;
    char *body;
    do {
        if (length >= HEAD_SIZE)
            fail("too long a head");
        length += receive(fd, buffer + length, size - 1 - length);
        buffer[length] = 0;
    } while (!(body = end_of_head(buffer)));
    size_t head_length = body - buffer;
    if (head_length >= HEAD_SIZE)
        fail("too long a head");
    memcpy(head, buffer, head_length);
    head[head_length] = 0;
    memmove(buffer, body, length - head_length);
    return length - head_length;
}

static long length_of_body(const char *head)
{
    const char *length = header(head, "\r\ncontent-length:");
    if (strncmp(head, "HTTP/1.1 200 ", 13) || !length)
        fail("not what was asked for: %.*s%s", (int)strcspn(head, "\r"), head, length ? "" : " without a length");
    return atol(length);
}

static void down(int fd, long size)
{
    static const char REQUEST[] = "GET /bench/body HTTP/1.1\r\nHost: localhost\r\n\r\n";
    char head[HEAD_SIZE];
    send_all(fd, REQUEST, sizeof REQUEST - 1);
    long had = read_head(fd, chunk, CHUNK, head);
    if (length_of_body(head) != size)
        fail("%ld bytes announced in place of %ld", length_of_body(head), size);
    while (had < size)
        had += receive(fd, chunk, CHUNK);
    if (had != size)
        fail("%ld bytes too many", had - size);
}

static void up(int fd, long size)
{
    char head[HEAD_SIZE], text[512 + HEAD_SIZE];
    int length = snprintf(text, sizeof text,
                          "POST /bench/up HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
                          "Content-Length: %ld\r\n\r\n", size);
    send_all(fd, text, length);
    for (long left = size; left > 0; left -= CHUNK)
        send_all(fd, chunk, left < CHUNK ? left : CHUNK);
    long had = read_head(fd, text, sizeof text, head), wanted = length_of_body(head);
    while (had < wanted && had < (long)sizeof text - 1)
        had += receive(fd, text + had, sizeof text - 1 - had);
    text[had] = 0;
    if (atol(text) != size)
        fail("%s bytes arrived of %ld", text, size);
}

static void transfer_bodies(void (*transfer)(int, long), long size, double seconds)
{
    long count = 0;
    double start = now();
    do {
        int fd = join();
        transfer(fd, size);
        close(fd);
        count++;
    } while (now() - start < seconds);
    printf("%ld %f\n", count, now() - start);
}

static char frame[6 + PAYLOAD], echoed[2 + PAYLOAD];

static void make_frames(void)
{
    static const char mask[4] = {0x37, (char)0xfa, 0x21, 0x3d};
    frame[0] = echoed[0] = (char)0x81; /* the whole of a text */
    frame[1] = (char)(0x80 | PAYLOAD);
    echoed[1] = PAYLOAD;
    memcpy(frame + 2, mask, 4);
    for (int i = 0; i < PAYLOAD; i++) {
        echoed[2 + i] = 'a' + i % 26;
        frame[6 + i] = echoed[2 + i] ^ mask[i & 3];
    }
}

static void open_websocket(struct client *c)
{
    static const char HANDSHAKE[] =
        "GET /bench/echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " KEY "\r\n\r\n";
    char head[HEAD_SIZE];
    c->fd = join();
    send_all(c->fd, HANDSHAKE, sizeof HANDSHAKE - 1);
    size_t early = read_head(c->fd, c->buffer, sizeof c->buffer, head);
    const char *accepted = header(head, "\r\nsec-websocket-accept:");
    if (strncmp(head, "HTTP/1.1 101 ", 13) || !accepted || strncmp(accepted, ACCEPT "\r", sizeof ACCEPT) || early)
        fail("no handshake: %.*s", (int)strcspn(head, "\r"), head);
}

static void send_frame(struct client *c)
{
    if (send(c->fd, frame, sizeof frame, MSG_NOSIGNAL) != sizeof frame)
        fail("send: %m");
}

/* Reads what there is: whether the echo is whole. */
static int echo_is_whole(struct client *c)
{
    c->length += receive(c->fd, c->buffer + c->length, sizeof echoed + 1 - c->length);
    if (c->length < sizeof echoed)
        return 0;
    if (c->length > sizeof echoed || memcmp(c->buffer, echoed, sizeof echoed))
        fail("a wrong echo");
    c->length = 0;
    return 1;
}

static void echo(int many, double seconds)
{
    int poll = epoll_create1(EPOLL_CLOEXEC);
    struct client *all = room(many, sizeof *all);
    struct epoll_event *events = room(many, sizeof *events);
    for (int i = 0; i < many; i++) {
        open_websocket(&all[i]);
        watch(poll, all[i].fd, &all[i]);
    }
    long count = 0;
    double start = now(), end = start + seconds;
    for (int i = 0; i < many; i++)
        send_frame(&all[i]);
    while (now() < end) {
        int ready = epoll_wait(poll, events, many, 10000);
        if (!ready)
            fail("no echo for 10 s");
        for (int i = 0; i < ready; i++)
            if (echo_is_whole(events[i].data.ptr)) {
                count++;
                send_frame(events[i].data.ptr);
            }
    }
    printf("%ld %f\n", count, now() - start);
}

static void echo_once(struct client *all, int many, const char *word)
{
    for (int i = 0; i < many; i++) {
        send_frame(&all[i]);
        while (!echo_is_whole(&all[i]))
            ;
    }
    puts(word);
    fflush(stdout);
}

static void idle(int many)
{
    char end;
    struct client *all = room(many, sizeof *all);
    for (int i = 0; i < many; i++)
        open_websocket(&all[i]);
    echo_once(all, many, "open");
    while (read(0, &end, 1) > 0)
        ;
    echo_once(all, many, "alive");
}

static void ask(struct client *c, int poll)
{
    static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    c->length = 0;
    c->fd = join_at_once();
    watch(poll, c->fd, c);
    if (send(c->fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) != sizeof REQUEST - 1)
        fail("send: %m");
}

/* Reads what there is: whether the connection has come to its end. */
static int has_ended(struct client *c)
{
    for (;;) {
        ssize_t got = recv(c->fd, c->buffer + c->length, sizeof c->buffer - c->length, MSG_DONTWAIT);
        if (got <= 0) /* at EAGAIN there is more to come */
            return got == 0 || errno != EAGAIN;
        c->length += got;
    }
}

static void connections(int many, double seconds, const char *wanted)
{
    int poll = epoll_create1(EPOLL_CLOEXEC);
    size_t length = strlen(wanted);
    struct client *all = room(many, sizeof *all);
    struct epoll_event *events = room(many, sizeof *events);
    long count = 0;
    double start = now(), end = start + seconds;
    for (int i = 0; i < many; i++)
        ask(&all[i], poll);
    while (now() < end) {
        int ready = epoll_wait(poll, events, many, 1000);
        for (int i = 0; i < ready; i++) {
            struct client *c = events[i].data.ptr;
            if (!has_ended(c))
                continue;
            if (c->length <= 12 + length || memcmp(c->buffer, "HTTP/1.", 7) || memcmp(c->buffer + 8, " 200", 4)
                || memcmp(c->buffer + c->length - length, wanted, length))
                fail("a wrong response: %.*s", c->length < 100 ? (int)c->length : 100, c->buffer);
            count++;
            close(c->fd);
            ask(c, poll);
        }
    }
    printf("%ld %f\n", count, now() - start);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    const char *what = argc > 1 ? argv[1] : "";
    if (argc == 2 && !strcmp(what, "upstream"))
        upstream();
    if (argc < 4 || strlen(argv[2]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[2]);
    make_frames();
    long number = atol(argv[3]);
    double seconds = argc > 4 ? atof(argv[4]) : 0;
    if (argc == 6 && !strcmp(what, "connections"))
        connections(number, seconds, argv[5]);
    else if (argc == 5 && !strcmp(what, "echo"))
        echo(number, seconds);
    else if (argc == 4 && !strcmp(what, "idle"))
        idle(number);
    else if (argc == 5 && (!strcmp(what, "down") || !strcmp(what, "up")))
        transfer_bodies(*what == 'd' ? down : up, number, seconds);
    else
        return 2;
    return 0;
}

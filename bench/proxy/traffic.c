/* Traffic for bench/proxy.py: the upstream of a proxy, and the clients that reach the proxy over a UNIX socket.
 *
 *     traffic upstream
 *         serves on a free port of 127.0.0.1, which it prints:
 *         GET /bench/hello   "Hello World!"
 *         POST /bench/sum    adler32 of the body, in decimal
 *         POST /bench/up     the length of the body, which is discarded
 *         GET /bench/echo    a WebSocket that answers each frame with its payload
 *     traffic echo SOCKET CONNECTIONS SECONDS
 *         WebSockets with one message of 125 bytes in flight each; prints the messages and the seconds
 *     traffic idle SOCKET CONNECTIONS
 *         opens WebSockets, carries one message over each, prints "open", waits for the end of its standard input,
 *         carries another message over each and prints "alive"
 *     traffic down SOCKET BYTES SECONDS
 *         asks for /bench/body again and again until the seconds are over; prints the bodies and the seconds
 *     traffic up SOCKET BYTES SECONDS
 *         posts as many bytes to /bench/up, the same way
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
#include <strings.h>
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

static const char HELLO[] = "Hello World!";
static const char HANDSHAKE[] = "GET /bench/echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " KEY "\r\n\r\n";
static const char SWITCH[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             "Sec-WebSocket-Accept: " ACCEPT "\r\n\r\n";

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

static void fail_with_errno(const char *what)
{
    fail("%s: %s", what, strerror(errno));
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int poller(void)
{
    int poll = epoll_create1(EPOLL_CLOEXEC);
    if (poll < 0)
        fail_with_errno("epoll_create1");
    return poll;
}

static void watch(int poll, int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
        fail_with_errno("epoll_ctl");
}

/* The end of a message's head in a buffer that ends with a NUL, or NULL. */
static char *end_of_head(char *head)
{
    char *end = strstr(head, "\r\n\r\n");
    return end ? end + 4 : NULL;
}

/* The value of a field, which ends with CR, or NULL. The name is given with its colon. */
static const char *field(const char *head, const char *name)
{
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        if (!strncasecmp(line, name, strlen(name))) {
            line += strlen(name);
            return line + strspn(line, " ");
        }
    }
    return NULL;
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
    /* small answers to clients that wait for them: they fit the socket's buffer */
    return send(p->fd, what, length, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)length;
}

static int answer(struct peer *p, const char *status, const char *body)
{
    char text[512];
    int length = snprintf(text, sizeof text, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n%s",
                          status, strlen(body), body);
    return say(p, text, length);
}

static int body_is_whole(struct peer *p)
{
    char text[32];
    snprintf(text, sizeof text, "%lu", p->state == SUM ? (unsigned long)p->b << 16 | p->a : (unsigned long)p->size);
    p->state = HEAD;
    return answer(p, "200 OK", text);
}

static void add_to_body(struct peer *p, const char *data, size_t length)
{
    p->left -= length;
    for (size_t i = 0; p->state == SUM && i < length; i++) {
        p->a = (p->a + (uint8_t)data[i]) % 65521;
        p->b = (p->b + p->a) % 65521;
    }
}

/* Whole frames in the buffer are answered. */
static int echo(struct peer *p)
{
    char out[HEAD_SIZE];
    size_t used = 0, filled = 0;
    for (;;) {
        uint8_t *frame = (uint8_t *)p->buffer + used;
        size_t rest = p->length - used;
        if (rest < 2)
            break;
        size_t size = frame[1] & 0x7f;
        if (!(frame[1] & 0x80) || size > PAYLOAD || (frame[0] & 0xf) == 8)
            return 0; /* no mask, too long, or the close frame */
        if (rest < 6 + size)
            break;
        out[filled++] = frame[0];
        out[filled++] = (char)size;
        for (size_t i = 0; i < size; i++)
            out[filled++] = frame[6 + i] ^ frame[2 + (i & 3)];
        used += 6 + size;
    }
    p->length -= used;
    memmove(p->buffer, p->buffer + used, p->length);
    return !filled || say(p, out, filled);
}

/* Answers what is whole in the buffer; whether the connection stays. */
static int serve(struct peer *p)
{
    while (p->state != FRAMES) {
        if (p->state != HEAD) {
            if (p->left)
                return 1;
            if (!body_is_whole(p))
                return 0;
        }
        p->buffer[p->length] = 0;
        char *body = end_of_head(p->buffer);
        if (!body)
            return p->length < HEAD_SIZE;
        size_t early = p->buffer + p->length - body;
        const char *length = field(p->buffer, "content-length:"), *key = field(p->buffer, "sec-websocket-key:");
        if (field(p->buffer, "transfer-encoding:")) {
            answer(p, "411 Length Required", "");
            return 0;
        }
        p->size = p->left = length ? atol(length) : 0;
        p->a = 1;
        p->b = 0;
        if (!strncmp(p->buffer, "GET /bench/hello ", 17)) {
            if (!answer(p, "200 OK", HELLO))
                return 0;
        } else if (!strncmp(p->buffer, "POST /bench/sum ", 16)) {
            p->state = SUM;
        } else if (!strncmp(p->buffer, "POST /bench/up ", 15)) {
            p->state = UP;
        } else if (!strncmp(p->buffer, "GET /bench/echo ", 16) && key && !strncmp(key, KEY "\r", sizeof KEY)) {
            p->state = FRAMES;
            if (!say(p, SWITCH, sizeof SWITCH - 1))
                return 0;
        } else {
            answer(p, "400 Bad Request", "");
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
    }
    return echo(p);
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
    if (got < 0 && errno == EAGAIN)
        return 1;
    return got > 0 && serve(p);
}

static _Noreturn void upstream(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), poll = poller(), one = 1;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)
        || getsockname(listener, (struct sockaddr *)&address, &size))
        fail_with_errno("listen");
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
            if (!(p = malloc(sizeof *p)))
                fail("no memory");
            p->fd = fd;
            p->state = HEAD;
            p->length = 0;
            watch(poll, fd, p);
        }
    }
}

/* --- the clients ------------------------------------------------------------------------------------- */

static struct sockaddr_un address = {.sun_family = AF_UNIX};

static int join(void)
{
    static const struct timeval PATIENCE = {.tv_sec = 20};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &PATIENCE, sizeof PATIENCE)
        || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &PATIENCE, sizeof PATIENCE)
        || connect(fd, (struct sockaddr *)&address, sizeof address))
        fail_with_errno("connect");
    return fd;
}

static void send_all(int fd, const char *data, size_t length)
{
    while (length) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent < 0)
            fail_with_errno("send");
        data += sent;
        length -= sent;
    }
}

/* Reads a head; what came behind it is moved to the beginning of the buffer, its length is returned. */
static size_t read_head(int fd, char *buffer, size_t size, char *head)
{
    size_t length = 0;
    for (;;) {
        ssize_t got = recv(fd, buffer + length, size - 1 - length, 0);
        if (got <= 0)
            fail("the answer broke off in its head, or nothing came");
        length += got;
        buffer[length] = 0;
        char *body = end_of_head(buffer);
        if (body && (size_t)(body - buffer) < HEAD_SIZE) {
            memcpy(head, buffer, body - buffer);
            head[body - buffer] = 0;
            length -= body - buffer;
            memmove(buffer, body, length);
            return length;
        }
        if (body || length >= HEAD_SIZE)
            fail("too long a head");
    }
}

static long length_of(const char *head, int want_ok)
{
    const char *length = field(head, "content-length:");
    if (want_ok && (strncmp(head, "HTTP/1.1 200 ", 13) || !length))
        fail("not what was asked for: %.*s%s", (int)strcspn(head, "\r"), head, length ? "" : " without a length");
    return atol(length);
}

static void down(long size)
{
    static const char REQUEST[] = "GET /bench/body HTTP/1.1\r\nHost: localhost\r\n\r\n";
    char head[HEAD_SIZE];
    int fd = join();
    send_all(fd, REQUEST, sizeof REQUEST - 1);
    long had = read_head(fd, chunk, CHUNK, head);
    if (length_of(head, 1) != size)
        fail("%ld bytes announced in place of %ld", length_of(head, 1), size);
    while (had < size) {
        ssize_t got = recv(fd, chunk, CHUNK, 0);
        if (got <= 0)
            fail("the body broke off after %ld bytes", had);
        had += got;
    }
    if (had != size)
        fail("%ld bytes too many", had - size);
    close(fd);
}

static void up(long size)
{
    char head[HEAD_SIZE], request[256];
    int fd = join();
    int length = snprintf(request, sizeof request,
                          "POST /bench/up HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
                          "Content-Length: %ld\r\n\r\n", size);
    send_all(fd, request, length);
    for (long left = size; left; left -= left < CHUNK ? left : CHUNK)
        send_all(fd, chunk, left < CHUNK ? left : CHUNK);
    char text[512 + HEAD_SIZE];
    long had = read_head(fd, text, sizeof text, head), wanted = length_of(head, 1);
    while (had < wanted && had < (long)sizeof text - 1) {
        ssize_t got = recv(fd, text + had, sizeof text - 1 - had, 0);
        if (got <= 0)
            fail("the answer broke off");
        had += got;
    }
    text[had] = 0;
    if (atol(text) != size)
        fail("%s bytes arrived of %ld", text, size);
    close(fd);
}

static int transfers(void (*transfer)(long), long size, double seconds)
{
    long count = 0;
    double start = now();
    do {
        transfer(size);
        count++;
    } while (now() - start < seconds);
    printf("%ld %f\n", count, now() - start);
    return 0;
}

struct socket_client {
    int fd;
    size_t length;
    uint8_t buffer[2 + PAYLOAD + 1];
};

static uint8_t frame[6 + PAYLOAD], echoed[2 + PAYLOAD];

static void make_frames(void)
{
    static const uint8_t mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    frame[0] = echoed[0] = 0x81; /* the whole of a text */
    frame[1] = 0x80 | PAYLOAD;
    echoed[1] = PAYLOAD;
    memcpy(frame + 2, mask, 4);
    for (int i = 0; i < PAYLOAD; i++) {
        echoed[2 + i] = 'a' + i % 26;
        frame[6 + i] = echoed[2 + i] ^ mask[i & 3];
    }
}

static void open_websocket(struct socket_client *c)
{
    char buffer[HEAD_SIZE + 1], head[HEAD_SIZE];
    c->fd = join();
    c->length = 0;
    send_all(c->fd, HANDSHAKE, sizeof HANDSHAKE - 1);
    size_t early = read_head(c->fd, buffer, sizeof buffer, head);
    const char *accepted = field(head, "sec-websocket-accept:");
    if (strncmp(head, "HTTP/1.1 101 ", 13) || !accepted || strncmp(accepted, ACCEPT "\r", sizeof ACCEPT) || early)
        fail("no handshake: %.*s", (int)strcspn(head, "\r"), head);
}

static void say_frame(struct socket_client *c)
{
    if (send(c->fd, frame, sizeof frame, MSG_NOSIGNAL) != sizeof frame)
        fail_with_errno("send");
}

/* Reads what there is: whether the echo is whole. */
static int heard(struct socket_client *c, int flags)
{
    ssize_t got = recv(c->fd, c->buffer + c->length, sizeof c->buffer - c->length, flags);
    if (got < 0 && errno == EAGAIN && flags)
        return 0;
    if (got <= 0)
        fail("a WebSocket was closed, or is silent");
    c->length += got;
    if (c->length < sizeof echoed)
        return 0;
    if (c->length > sizeof echoed || memcmp(c->buffer, echoed, sizeof echoed))
        fail("a wrong echo");
    c->length = 0;
    return 1;
}

static int echoes(int many, double seconds)
{
    int poll = poller();
    struct socket_client *all = calloc(many, sizeof *all);
    struct epoll_event *events = calloc(many, sizeof *events);
    if (!all || !events)
        fail("no memory");
    for (int i = 0; i < many; i++) {
        open_websocket(&all[i]);
        watch(poll, all[i].fd, &all[i]);
    }
    long count = 0;
    double start = now(), end = start + seconds;
    for (int i = 0; i < many; i++)
        say_frame(&all[i]);
    while (now() < end) {
        int ready = epoll_wait(poll, events, many, 10000);
        if (!ready)
            fail("no echo for 10 s");
        for (int i = 0; i < ready; i++)
            if (heard(events[i].data.ptr, MSG_DONTWAIT)) {
                count++;
                say_frame(events[i].data.ptr);
            }
    }
    printf("%ld %f\n", count, now() - start);
    return 0;
}

static void once_around(struct socket_client *all, int many)
{
    for (int i = 0; i < many; i++) {
        say_frame(&all[i]);
        while (!heard(&all[i], 0))
            ;
    }
}

static int idle(int many)
{
    char end;
    struct socket_client *all = calloc(many, sizeof *all);
    if (!all)
        fail("no memory");
    for (int i = 0; i < many; i++)
        open_websocket(&all[i]);
    once_around(all, many);
    puts("open");
    fflush(stdout);
    while (read(0, &end, 1) > 0)
        ;
    once_around(all, many);
    puts("alive");
    return 0;
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
    if (argc == 5 && !strcmp(what, "echo"))
        return echoes(atoi(argv[3]), atof(argv[4]));
    if (argc == 4 && !strcmp(what, "idle"))
        return idle(atoi(argv[3]));
    if (argc == 5 && !strcmp(what, "down"))
        return transfers(down, atol(argv[3]), atof(argv[4]));
    if (argc == 5 && !strcmp(what, "up"))
        return transfers(up, atol(argv[3]), atof(argv[4]));
    return 2;
}

/* Load for the benchmarks: clients that reach a server or a proxy over a UNIX socket, and the upstream of a proxy.
 *
 *     traffic connections ADDRESS COUNT SECONDS RESPONSE
 *         so many connections at a time, each of which carries one request with "Connection: close" and is read to its
 *         end, where RESPONSE has to be; prints the responses and the seconds
 *     traffic visitors ADDRESS COUNT SECONDS RESPONSE
 *         the same in HTTP/1.0, with the ten headers that a browser's request has behind nginx, of which four differ in
 *         each request
 *     traffic fresh ADDRESS COUNT SECONDS RESPONSE
 *         connections that are kept, with these headers
 *     traffic latency ADDRESS COUNT SECONDS RESPONSE RATE
 *         so many requests a second, whether or not the server keeps up, over kept connections; every twentieth asks for
 *         /slow. Prints the responses, the seconds, and of the others the median, the 99th and the 99.9th percentile in
 *         microseconds, from when a request was due to its response. With a RATE of 0 each connection has a request at
 *         any time
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
 * ADDRESS is the path of a UNIX socket, or a port of 127.0.0.1.
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
static int poll;

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

static void watch(int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl: %m");
}

/* The value of a header, which ends with CR, or NULL. The name is given with the line's end before it and its colon. */
static const char *header(const char *head, const char *name)
{
    const char *line = strcasestr(head, name);
    return line ? line + strlen(name) + strspn(line + strlen(name), " ") : NULL;
}

struct client {
    int fd, upgraded, slow;
    double due;
    size_t length; /* of what is in the buffer */
    char buffer[HEAD_SIZE + 1];
};

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
static size_t receive(int fd, char *buffer, size_t size, int flags)
{
    ssize_t got = recv(fd, buffer, size, flags);
    if (got <= 0)
        fail("the other side closed the connection, or nothing came");
    return got;
}

/* Reads a head; what came behind it is moved to the beginning of the buffer, its length is returned. */
static size_t read_head(int fd, char *buffer, size_t size, char *head)
{
    size_t length = 0;
    char *end;
    do {
        length += receive(fd, buffer + length, size - 1 - length, 0);
        buffer[length] = 0;
        end = strstr(buffer, "\r\n\r\n");
    } while (!end && length < HEAD_SIZE);
    if (!end || end + 4 >= buffer + HEAD_SIZE)
        fail("too long a head");
    size_t head_length = end + 4 - buffer;
    memcpy(head, buffer, head_length);
    head[head_length] = 0;
    memmove(buffer, end + 4, length - head_length);
    return length - head_length;
}

/* --- the upstream ------------------------------------------------------------------------------------ */

static int respond(int fd, const char *body)
{
    char text[256];
    int length = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n%s",
                          strlen(body), body);
    send_all(fd, text, length);
    return 1;
}

/* Serves a whole request; whether the connection stays. It may wait for the rest: but for WebSockets, the load makes
 * one request at a time here. */
static int serve(struct client *p)
{
    static const char SWITCH[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                 "Sec-WebSocket-Accept: " ACCEPT "\r\n\r\n";
    char head[HEAD_SIZE], text[32], *part = p->buffer;
    if (recv(p->fd, text, 1, MSG_PEEK) <= 0)
        return 0;
    size_t got = read_head(p->fd, p->buffer, sizeof p->buffer, head);
    const char *length = header(head, "\r\ncontent-length:"), *key = header(head, "\r\nsec-websocket-key:");
    int up = !strncmp(head, "POST /bench/up ", 15);
    if (!strncmp(head, "GET /bench/hello ", 17))
        return respond(p->fd, "Hello World!");
    if (!strncmp(head, "GET /bench/echo ", 16) && key && !strncmp(key, KEY "\r", sizeof KEY)) {
        send_all(p->fd, SWITCH, sizeof SWITCH - 1);
        p->upgraded = 1;
        p->length = got;
        return 1;
    }
    if (!length || (!up && strncmp(head, "POST /bench/sum ", 16)))
        return 0;
    unsigned long a = 1, b = 0; /* of adler32, RFC 1950, section 9 */
    for (long left = atol(length);; part = chunk) {
        for (size_t i = 0; !up && i < got; i++) {
            a = (a + (uint8_t)part[i]) % 65521;
            b = (b + a) % 65521;
        }
        if ((left -= got) <= 0)
            break;
        /* TCP discards with MSG_TRUNC, without a copy */
        got = receive(p->fd, chunk, left < CHUNK ? left : CHUNK, up ? MSG_TRUNC : 0);
    }
    snprintf(text, sizeof text, "%lu", up ? (unsigned long)atol(length) : b << 16 | a);
    return respond(p->fd, text);
}

/* Sends back what whole frames carry; whether the connection stays. */
static int echo_frames(struct client *p)
{
    char out[HEAD_SIZE];
    size_t used = 0, filled = 0, size;
    ssize_t got = recv(p->fd, p->buffer + p->length, HEAD_SIZE - p->length, 0);
    if (got <= 0)
        return 0;
    p->length += got;
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
    send_all(p->fd, out, filled);
    return 1;
}

static _Noreturn void upstream(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[64];
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)
        || getsockname(listener, (struct sockaddr *)&address, &size))
        fail("listen: %m");
    watch(listener, NULL);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int fd, ready = epoll_wait(poll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct client *p = events[i].data.ptr;
            if (p && !(p->upgraded ? echo_frames(p) : serve(p))) {
                close(p->fd);
                free(p);
            } else if (!p && (fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                p = room(1, sizeof *p);
                p->fd = fd;
                watch(fd, p);
            }
        }
    }
}

/* --- the clients ------------------------------------------------------------------------------------- */

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static struct sockaddr_in port = {.sin_family = AF_INET};

static int join_at_once(void)
{
    int fd = socket(port.sin_port ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || (port.sin_port ? connect(fd, (struct sockaddr *)&port, sizeof port)
                                 : connect(fd, (struct sockaddr *)&address, sizeof address)))
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

static void transfer(int posts, long size)
{
    char head[HEAD_SIZE];
    int fd = join();
    int length = snprintf(head, sizeof head, posts ? "POST /bench/up HTTP/1.1\r\nHost: localhost\r\nContent-Length: %ld\r\n"
                          "Content-Type: application/octet-stream\r\n\r\n"
                          : "GET /bench/body HTTP/1.1\r\nHost: localhost\r\n\r\n", size);
    send_all(fd, head, length);
    for (long left = posts ? size : 0; left > 0; left -= CHUNK)
        send_all(fd, chunk, left < CHUNK ? left : CHUNK);
    long had = read_head(fd, chunk, CHUNK, head);
    const char *value = header(head, "\r\ncontent-length:");
    if (strncmp(head, "HTTP/1.1 200 ", 13) || !value || (posts ? atol(value) > 20 : atol(value) != size))
        fail("not what was asked for: %.*s, Content-Length: %ld", (int)strcspn(head, "\r"), head, value ? atol(value) : -1);
    while (had < atol(value))
        had += receive(fd, chunk + (posts ? had : 0), CHUNK - 1 - (posts ? had : 0), 0);
    chunk[posts ? had : 0] = 0;
    if (posts ? atol(chunk) != size : had != size)
        fail("%ld bytes arrived of %ld", posts ? atol(chunk) : had, size);
    close(fd);
}

static void transfer_bodies(int posts, long size, double seconds)
{
    long count = 0;
    double start = now();
    do {
        transfer(posts, size);
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
    c->length += receive(c->fd, c->buffer + c->length, sizeof echoed + 1 - c->length, 0);
    if (c->length < sizeof echoed)
        return 0;
    if (c->length > sizeof echoed || memcmp(c->buffer, echoed, sizeof echoed))
        fail("a wrong echo");
    c->length = 0;
    return 1;
}

/* Has every client begin, and begin again whenever what it waits for is whole. */
static void keep_busy(struct client *all, int many, double seconds, void (*begin)(struct client *),
                      int (*is_whole)(struct client *))
{
    struct epoll_event *events = room(many, sizeof *events);
    long count = 0;
    double start = now(), end = start + seconds;
    for (int i = 0; i < many; i++)
        begin(&all[i]);
    while (now() < end) {
        int ready = epoll_wait(poll, events, many, 10000);
        if (!ready)
            fail("no response for 10 s");
        for (int i = 0; i < ready; i++)
            if (is_whole(events[i].data.ptr)) {
                count++;
                begin(events[i].data.ptr);
            }
    }
    printf("%ld %f\n", count, now() - start);
}

static void echo(int many, double seconds)
{
    struct client *all = room(many, sizeof *all);
    for (int i = 0; i < many; i++) {
        open_websocket(&all[i]);
        watch(all[i].fd, &all[i]);
    }
    keep_busy(all, many, seconds, send_frame, echo_is_whole);
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

static const char *wanted;

static void send_request(struct client *c, const char *text, int length)
{
    c->length = 0;
    if (send(c->fd, text, length, MSG_NOSIGNAL) != length)
        fail("send: %m");
}

static void ask(struct client *c)
{
    static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    c->fd = join_at_once();
    watch(c->fd, c);
    send_request(c, REQUEST, sizeof REQUEST - 1);
}

/* What a browser sends, as nginx passes it on: 700 bytes, of which the address, the page, the session and the tag are new
 * each time. */
static void browse(struct client *c, int version, const char *connection)
{
    static const char REQUEST[] =
        "GET / HTTP/1.%d\r\nHost: shop.example.org\r\nConnection: %s\r\nX-Forwarded-For: 10.%u.%u.%u\r\n"
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
        "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n"
        "Accept-Language: en-GB,en;q=0.7,de;q=0.3\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n"
        "Referer: https://shop.example.org/catalogue/section/page/%u?order=price&direction=descending\r\n"
        "Cookie: session=%08x%08x%08x%08x%08x%08x%08x%08x; consent=necessary-statistics; theme=dark; lang=en_GB; cart=3\r\n"
        "If-None-Match: W/\"%08x-5f3759df\"\r\n\r\n";
    static unsigned n;
    char text[1024];
    n = n * 1664525 + 1013904223;
    int length = snprintf(text, sizeof text, REQUEST, version, connection, n >> 24, n >> 16 & 255, n >> 8 & 255, n >> 12, n,
                          ~n, n >> 3, n ^ 0x5bd1e995, n, ~n, n >> 3, n ^ 0x5bd1e995, n);
    send_request(c, text, length);
}

static void visit(struct client *c)
{
    c->fd = join_at_once();
    watch(c->fd, c);
    browse(c, 0, "close");
}

static void browse_on(struct client *c)
{
    if (!c->fd) {
        c->fd = join_at_once();
        watch(c->fd, c);
    }
    browse(c, 1, "keep-alive");
}

/* Whether the buffer holds a response from its beginning to its end. */
static int is_complete(struct client *c)
{
    size_t length = strlen(wanted);
    return c->length > 12 + length && !memcmp(c->buffer, "HTTP/1.", 7) && !memcmp(c->buffer + 8, " 200", 4)
        && !memcmp(c->buffer + c->length - length, wanted, length);
}

/* Reads what there is: whether the connection has come to its end. */
static int connection_is_over(struct client *c)
{
    ssize_t got;
    while ((got = recv(c->fd, c->buffer + c->length, sizeof c->buffer - c->length, MSG_DONTWAIT)) > 0)
        c->length += got;
    if (got < 0 && errno == EAGAIN)
        return 0;
    if (!is_complete(c))
        fail("a wrong response: %.*s", c->length < 100 ? (int)c->length : 100, c->buffer);
    close(c->fd);
    return 1;
}

/* Reads what there is: whether that completes the response. */
static int response_is_whole(struct client *c)
{
    c->length += receive(c->fd, c->buffer + c->length, sizeof c->buffer - c->length, 0);
    if (c->length > 12 && memcmp(c->buffer + 8, " 200", 4))
        fail("a wrong response: %.*s", c->length < 100 ? (int)c->length : 100, c->buffer);
    return is_complete(c);
}

static int by_size(const void *a, const void *b)
{
    return (*(float *)a > *(float *)b) - (*(float *)a < *(float *)b);
}

static void begin_due(struct client *c, double due)
{
    static const char *const REQUESTS[] = {"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                           "GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"};
    static unsigned number;
    c->slow = ++number % 20 == 0;
    c->due = due;
    send_request(c, REQUESTS[c->slow], strlen(REQUESTS[c->slow]));
}

static void measure_latency(int many, double seconds, double rate)
{
    struct client *all = room(many, sizeof *all), **idle = room(many, sizeof *idle);
    struct epoll_event *events = room(many, sizeof *events);
    size_t count = 0, fast = 0, most = 1 << 22;
    float *took = room(most, sizeof *took);
    int first = 0, idlers = 0;
    for (int i = 0; i < many; i++) {
        all[i].fd = join_at_once();
        watch(all[i].fd, &all[i]);
        idle[idlers++] = &all[i];
    }
    double start = now(), due = start, time;
    while ((time = now()) < start + seconds) {
        for (; idlers && (!rate || due <= time); due += rate ? 1 / rate : 0) {
            begin_due(idle[first++ % many], rate ? due : time);
            idlers--;
        }
        /* it does not sleep: to be woken would take longer than many a response */
        int ready = epoll_wait(poll, events, many, rate ? 0 : 10000);
        for (int i = 0; i < ready; i++) {
            struct client *c = events[i].data.ptr;
            if (response_is_whole(c)) {
                count++;
                if (!c->slow && fast < most)
                    took[fast++] = 1e6 * (now() - c->due);
                idle[(first + idlers++) % many] = c;
            }
        }
    }
    if (!fast)
        fail("no response");
    qsort(took, fast, sizeof *took, by_size);
    printf("%zu %f %.0f %.0f %.0f\n", count, now() - start, took[fast / 2], took[fast * 99 / 100], took[fast * 999 / 1000]);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if ((poll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        fail("epoll_create1: %m");
    const char *what = argc > 1 ? argv[1] : "";
    if (argc == 2 && !strcmp(what, "upstream"))
        upstream();
    if (argc < 4 || strlen(argv[2]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[2]);
    port.sin_port = htons(atoi(argv[2]));
    port.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    make_frames();
    long number = atol(argv[3]);
    double seconds = argc > 4 ? atof(argv[4]) : 0;
    wanted = argc > 5 ? argv[5] : "";
    struct client *clients = argc == 6 ? room(number, sizeof *clients) : NULL;
    if (argc == 6 && !strcmp(what, "connections"))
        keep_busy(clients, number, seconds, ask, connection_is_over);
    else if (argc == 6 && !strcmp(what, "visitors"))
        keep_busy(clients, number, seconds, visit, connection_is_over);
    else if (argc == 6 && !strcmp(what, "fresh"))
        keep_busy(clients, number, seconds, browse_on, response_is_whole);
    else if (argc == 7 && !strcmp(what, "latency"))
        measure_latency(number, seconds, atof(argv[6]));
    else if (argc == 5 && !strcmp(what, "echo"))
        echo(number, seconds);
    else if (argc == 4 && !strcmp(what, "idle"))
        idle(number);
    else if (argc == 5 && (!strcmp(what, "down") || !strcmp(what, "up")))
        transfer_bodies(*what == 'u', number, seconds);
    else
        return 2;
    return 0;
}

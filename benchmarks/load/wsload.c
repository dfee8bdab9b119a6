/* Load client: many WebSocket subscribers in one thread, cheaper than any server they are served by.
 *
 * Connection i subscribes to conversation i % M, by the ((i / M) % number of paths)-th --path. With several --port, nodes
 * that serve the same conversations, it goes to the ((i / M / paths) % number of ports)-th. A run is started by a line on
 * the server's control port (by several --control in equal parts), or published from here (NATS; nchan, by HTTP). What
 * is delivered carries the text "@T" and 19 digits: CLOCK_MONOTONIC nanoseconds when it was published. These markers are
 * counted, per connection, in the payloads: a server may pack several messages into a frame or a write. One JSON line
 * tells the result.
 *
 * The client polls without sleeping while it measures: a sleeping one would charge its wake-ups to the server. How
 * much of that time it really worked is reported as client_busy.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum dialect { PLAIN, BROKER, NATS, SOCKETIO, NCHAN };   /* BROKER: a subscriber is ready when `ws.caught_up` has come */
enum state { CONNECTING, UPGRADING, PREPARING, READY, STALLED, GONE };

struct subscriber {
    int fd, conversation, node;
    enum state state;
    unsigned char header[10], header_used, header_wanted, opcode, in_payload, half_marker;
    unsigned step, text_used;
    uint64_t left;               /* payload bytes of the present frame that are still to come */
    uint64_t delivered;
    char text[512];              /* the handshake's answer; later the head of a frame that has to be understood */
};

/* A connection for publishing by HTTP: one request at a time. text: its answer so far. */
struct poster {
    int fd, waiting;
    unsigned text_used;
    char text[2048];
};

enum { MAX_PATHS = 64, MAX_PIDS = 32, MAX_NODES = 8 };
enum { POSTERS = 8 };            /* no more of them are under way at once, however large the window */

static int port[MAX_NODES], ports, control_port[MAX_NODES], control[MAX_NODES], controls;
static int connections = 1000, conversations = 1, publishers = 1, stall_every, in_flight = 64;
static int sample_every = 16, paths, pids, hold_s = -1, window = 1;
static const char *path[MAX_PATHS];
static int pid[MAX_PIDS];
static long messages = 100, warmup = 20;
static double rate, timeout_s = 60;
static enum dialect dialect = BROKER;

static struct subscriber *subscribers;
static struct poster posters[POSTERS];
static int poller, publisher = -1, ready, gone;
static uint64_t delivered, bytes, busy_ns;
/* Of each sample nanoseconds * MAX_NODES + the node that delivered it: sorted, each node's are in order too. */
static uint64_t *latencies, latency_count, until_sample = 1;
static const uint64_t LATENCIES_MAX = 1 << 22;
static unsigned char buffer[1 << 18];

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
}

static void fail(const char *what, long number)
{
    fprintf(stderr, "wsload: %s (%ld): %s\n", what, number, strerror(errno));
    exit(2);
}

/* CPU time of this thread: what others do on this core meanwhile is not the client's. */
static uint64_t worked_ns(void)
{
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + used.tv_nsec;
}

static int dial(int to_port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(to_port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0)
        fail("no more sockets", to_port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        fail("cannot connect to port", to_port);
    return fd;
}

static void send_all(int fd, const void *bytes_, size_t count)
{
    const char *at = bytes_;
    while (count) {
        ssize_t sent = send(fd, at, count, MSG_NOSIGNAL);
        if (sent > 0) {
            at += sent;
            count -= sent;
        } else if (errno == EAGAIN || errno == ENOTCONN) {
            struct pollfd writable = {fd, POLLOUT, 0};
            poll(&writable, 1, 1000);
        } else {
            return;
        }
    }
}

/* A client's frame, masked with zeros. */
static void send_frame(int fd, int opcode, const void *payload, size_t count)
{
    unsigned char frame[600] = {0x80 | opcode};
    size_t used = 2;
    if (count > 512)
        fail("frame too long", count);
    frame[1] = 0x80 | (count < 126 ? count : 126);
    if (count >= 126) {
        frame[used++] = count >> 8;
        frame[used++] = count & 255;
    }
    used += 4;
    memcpy(frame + used, payload, count);
    send_all(fd, frame, used + count);
}

static void now_ready(struct subscriber *one)
{
    one->state = READY;
    ready++;
}

static void lose(struct subscriber *one)
{
    if (one->state != GONE) {
        one->state = GONE;
        gone++;
        epoll_ctl(poller, EPOLL_CTL_DEL, one->fd, NULL);
    }
}

/* ---- what the dialects say between the handshake and the first message ---- */

static void prepare(struct subscriber *one)
{
    char text[160];
    int count;
    if (dialect == NATS && !strncmp(one->text, "INFO", 4) && !one->step++) {
        count = sprintf(text, "CONNECT {\"verbose\":false}\r\nSUB c%04d 1\r\nPING\r\n", one->conversation);
        send_frame(one->fd, 2, text, count);
    } else if (dialect == NATS && strstr(one->text, "PONG")) {
        now_ready(one);
    } else if (dialect == SOCKETIO && one->text[0] == '0') {
        send_frame(one->fd, 1, "40", 2);
    } else if (dialect == SOCKETIO && !strncmp(one->text, "40", 2)) {
        count = sprintf(text, "420[\"join\",\"c%04d\"]", one->conversation);
        send_frame(one->fd, 1, text, count);
    } else if (dialect == SOCKETIO && !strncmp(one->text, "43", 2)) {
        now_ready(one);
    } else if (dialect == BROKER && strstr(one->text, "\"ws.caught_up\"")) {
        now_ready(one);
    }
}

static void frame_ended(struct subscriber *one)
{
    one->in_payload = 0;
    one->text[one->text_used] = 0;
    if (one->opcode == 9)
        send_frame(one->fd, 10, one->text, one->text_used < 125 ? one->text_used : 125);
    else if (one->opcode == 8)
        lose(one);
    else if (one->state == PREPARING)
        prepare(one);
    else if (dialect == SOCKETIO && one->text[0] == '2' && one->text_used == 1)
        send_frame(one->fd, 1, "3", 1);
    else if (dialect == NATS && !strncmp(one->text, "PING", 4))
        send_frame(one->fd, 2, "PONG\r\n", 6);
}

/* ---- counting ---- */

static void count_one(struct subscriber *one, const unsigned char *digits, const unsigned char *end)
{
    uint64_t published = 0;
    one->delivered++;
    delivered++;
    if (--until_sample || end - digits < 19) {
        until_sample += !until_sample;   /* cut by the end of the read: take the next one */
        return;
    }
    until_sample = sample_every;
    for (int i = 0; i < 19; i++)
        published = published * 10 + (digits[i] - '0');
    if (latency_count < LATENCIES_MAX)
        latencies[latency_count++] = (now_ns() - published) * MAX_NODES + one->node;
}

static void count_markers(struct subscriber *one, const unsigned char *at, size_t count)
{
    const unsigned char *end = at + count;
    if (one->half_marker && count && *at == 'T')
        count_one(one, at + 1, end);
    one->half_marker = 0;
    while (at < end && (at = memchr(at, '@', end - at)) != NULL) {
        at++;
        if (at == end)
            one->half_marker = 1;
        else if (*at == 'T')
            count_one(one, at + 1, end);
    }
}

static void header_complete(struct subscriber *one)
{
    int length = one->header[1] & 127, first = 2;
    one->opcode = one->header[0] & 15;
    one->left = length;
    if (length >= 126) {
        one->left = 0;
        for (; first < one->header_wanted; first++)
            one->left = one->left << 8 | one->header[first];
    }
    one->header_used = 0;
    one->text_used = 0;
    one->in_payload = 1;
}

static void take_frames(struct subscriber *one, const unsigned char *at, size_t count)
{
    while (count && one->state != GONE) {
        if (!one->in_payload) {
            one->header[one->header_used++] = *at++;
            count--;
            if (one->header_used == 1)
                one->header_wanted = 2;
            else if (one->header_used == 2)
                one->header_wanted = (one->header[1] & 127) == 127 ? 10 : (one->header[1] & 127) == 126 ? 4 : 2;
            if (one->header_used < 2 || one->header_used < one->header_wanted)
                continue;
            header_complete(one);
            if (!one->left)
                frame_ended(one);
            continue;
        }
        size_t part = count < one->left ? count : one->left;
        if (one->opcode < 3 && one->state == READY)
            count_markers(one, at, part);
        if (one->opcode > 7 || one->state == PREPARING || dialect == NATS || dialect == SOCKETIO) {
            size_t room = sizeof one->text - 1 - one->text_used, kept = part < room ? part : room;
            memcpy(one->text + one->text_used, at, kept);
            one->text_used += kept;
        }
        at += part;
        count -= part;
        one->left -= part;
        if (!one->left)
            frame_ended(one);
    }
}

/* ---- sockets ---- */

static void ask_upgrade(struct subscriber *one)
{
    char request[1024], target[512];
    int number = one - subscribers;
    const char *chosen = path[number / conversations % paths], *place = strstr(chosen, "{c}");
    snprintf(target, sizeof target, "%.*sc%04d%s", (int)(place ? place - chosen : (long)strlen(chosen)), chosen,
             one->conversation, place ? place + 3 : "");
    if (!place)
        snprintf(target, sizeof target, "%s", chosen);
    int count = snprintf(request, sizeof request,
                         "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
                         target, port[one->node]);
    send_all(one->fd, request, count);
    one->state = UPGRADING;
}

static void take_upgrade(struct subscriber *one, size_t count)
{
    size_t room = sizeof one->text - 1 - one->text_used;
    if (count > room)
        fail("answer to the handshake too long", count);
    memcpy(one->text + one->text_used, buffer, count);
    one->text_used += count;
    one->text[one->text_used] = 0;
    char *end = strstr(one->text, "\r\n\r\n");
    if (!end)
        return;
    if (strncmp(one->text, "HTTP/1.1 101", 12)) {
        fprintf(stderr, "%s\n", one->text);
        fail("handshake refused, connection", one - subscribers);
    }
    size_t rest = one->text_used - (end + 4 - one->text);
    unsigned char early[sizeof one->text];
    memcpy(early, end + 4, rest);
    one->text_used = 0;
    one->state = PREPARING;
    if (dialect == PLAIN || dialect == NCHAN)
        now_ready(one);
    take_frames(one, early, rest);
}

static void take_input(struct subscriber *one)
{
    /* The first answer holds handshake and hello: read no more of it than fits the text. */
    size_t room = one->state == UPGRADING ? sizeof one->text - 1 - one->text_used : sizeof buffer;
    ssize_t got = recv(one->fd, buffer, room, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        lose(one);
        return;
    }
    bytes += got;
    if (one->state == UPGRADING)
        take_upgrade(one, got);
    else
        take_frames(one, buffer, got);
}

/* The answer to a published message: whole once its head and as many bytes as that announces are there. */
static void take_answer(struct poster *one)
{
    ssize_t got = recv(one->fd, one->text + one->text_used, sizeof one->text - 1 - one->text_used, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        fail("the server closed a connection for publishing; bytes of its answer", one->text_used);
    one->text_used += got;
    one->text[one->text_used] = 0;
    char *end = strstr(one->text, "\r\n\r\n"), *length = strcasestr(one->text, "\r\nContent-Length:");
    if (!end || one->text_used < end + 4 - one->text + (length && length < end ? strtoul(length + 17, NULL, 10) : 0))
        return;
    if (strncmp(one->text, "HTTP/1.1 20", 11)) {
        fprintf(stderr, "%s\n", one->text);
        fail("a message was refused; bytes of the answer", one->text_used);
    }
    one->waiting = one->text_used = 0;
}

static void poll_once(int wait_ms)
{
    struct epoll_event events[512];
    int count = epoll_wait(poller, events, 512, wait_ms);
    if (count <= 0)
        return;
    uint64_t begin = worked_ns();
    for (int i = 0; i < count; i++) {
        struct subscriber *one = events[i].data.ptr;
        if (events[i].data.ptr >= (void *)posters && events[i].data.ptr < (void *)(posters + POSTERS)) {
            take_answer(events[i].data.ptr);
        } else if (events[i].data.ptr >= (void *)control && events[i].data.ptr < (void *)(control + MAX_NODES)) {
            recv(*(int *)events[i].data.ptr, buffer, sizeof buffer, 0);   /* DONE: what counts is what is delivered */
        } else if (one == NULL) {                /* the publisher */
            ssize_t got = recv(publisher, buffer, sizeof buffer - 1, 0);
            if (got > 0) {
                buffer[got] = 0;
                if (strstr((char *)buffer, "PING"))
                    send_all(publisher, "PONG\r\n", 6);
            }
        } else if (one->state == CONNECTING) {
            struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
            epoll_ctl(poller, EPOLL_CTL_MOD, one->fd, &event);
            ask_upgrade(one);
        } else if (one->state != GONE) {
            take_input(one);
        }
    }
    busy_ns += worked_ns() - begin;
}

static void wait_s(double seconds)
{
    for (uint64_t end = now_ns() + (uint64_t)(seconds * 1e9); now_ns() < end;)
        poll_once(1);
}

static void open_subscribers(void)
{
    uint64_t begin = now_ns();
    int opened = 0;
    subscribers = calloc(connections, sizeof *subscribers);
    while (ready < connections) {
        for (; opened < connections && opened - ready < in_flight; opened++) {
            struct subscriber *one = &subscribers[opened];
            struct epoll_event event = {.events = EPOLLOUT, .data.ptr = one};
            one->conversation = opened % conversations;
            one->node = opened / conversations / paths % ports;
            one->fd = dial(port[one->node]);
            epoll_ctl(poller, EPOLL_CTL_ADD, one->fd, &event);
        }
        poll_once(100);
        if (gone)
            fail("connection lost while connecting; ready", ready);
        if (now_ns() - begin > timeout_s * 1e9)
            fail("connecting took too long; ready", ready);
    }
}

static void open_publisher(int to_port, int *fd, void *whose)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = whose};
    *fd = dial(to_port);
    epoll_ctl(poller, EPOLL_CTL_ADD, *fd, &event);
}

/* One of every `stall_every` stops reading, for good: from here on its socket only fills. */
static int stall_some(void)
{
    int stalled = 0, small = 4096;
    for (int i = 0; stall_every && i < connections; i++)
        if (i % stall_every == stall_every - 1) {
            struct subscriber *one = &subscribers[i];
            epoll_ctl(poller, EPOLL_CTL_DEL, one->fd, NULL);
            setsockopt(one->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
            one->state = STALLED;
            stalled++;
        }
    return stalled;
}

/* ---- publishing ---- */

static uint64_t sent, sent_begin, sent_base;
static double sent_rate;

/* Whether the next message is due, and not more than `window` of them are on their way. */
static int may_send(uint64_t total, int subscribers_each)
{
    if (sent >= total)
        return 0;
    if (sent_rate > 0)
        return now_ns() >= sent_begin + (uint64_t)(sent * 1e9 / sent_rate);
    return sent * subscribers_each < delivered - sent_base + (uint64_t)window * subscribers_each;
}

/* 220 bytes of JSON with the time. */
static void make_message(char *text)
{
    int count = sprintf(text, "{\"type\":\"note.said\",\"id\":\"n%09llu\",\"data\":{\"at\":\"@T%019llu\",\"text\":\"",
                        (unsigned long long)sent, (unsigned long long)now_ns());
    memset(text + count, 'x', 220 - 3 - count);
    memcpy(text + 217, "\"}}", 4);
}

static void publish_nats(uint64_t total, int subscribers_each)
{
    char line[400], text[300];
    while (may_send(total, subscribers_each)) {
        make_message(text);
        int count = sprintf(line, "PUB c%04d 220\r\n%s\r\n", (int)(sent % conversations), text);
        send_all(publisher, line, count);
        sent++;
    }
}

static void publish_http(uint64_t total, int subscribers_each)
{
    char request[600], text[300];
    for (int i = 0; i < POSTERS && may_send(total, subscribers_each); i++) {
        if (posters[i].waiting)
            continue;
        make_message(text);
        int count = sprintf(request, "POST /pub?id=c%04d HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 220\r\n\r\n%s",
                            (int)(sent % conversations), text);
        posters[i].waiting = 1;
        send_all(posters[i].fd, request, count);
        sent++;
    }
}

static int run(long count, double at_rate, int listeners)
{
    uint64_t total = (uint64_t)count * listeners, base = delivered, end = now_ns() + (uint64_t)(timeout_s * 1e9);
    if (dialect == NATS || dialect == NCHAN) {
        sent = 0;
        sent_rate = at_rate;
        sent_base = base;
        sent_begin = now_ns();
    } else {
        for (int i = 0; i < controls; i++) {
            char line[96];
            long part = count * (i + 1) / controls - count * i / controls;
            int used = sprintf(line, "PUB %d %ld %g %d\n", conversations, part, at_rate / controls,
                               (publishers + controls - 1) / controls);
            send_all(control[i], line, used);
        }
    }
    for (unsigned turn = 1; delivered - base < total; turn++) {
        if (dialect == NATS)
            publish_nats((uint64_t)count * conversations, listeners / conversations);
        else if (dialect == NCHAN)
            publish_http((uint64_t)count * conversations, listeners / conversations);
        poll_once(0);
        if (turn % 256 == 0 && now_ns() > end)
            return 0;
    }
    return 1;
}

/* ---- the result ---- */

static double process_cpu_s(int which)
{
    clockid_t clock;
    struct timespec used;
    if (clock_getcpuclockid(which, &clock) || clock_gettime(clock, &used))
        return 0;
    return used.tv_sec + used.tv_nsec / 1e9;
}

static double server_cpu_s(void)
{
    double sum = 0;
    for (int i = 0; i < pids; i++)
        sum += process_cpu_s(pid[i]);
    return sum;
}

static int by_size(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static double percentile_ms(double share)
{
    return latency_count ? latencies[(uint64_t)((latency_count - 1) * share)] / MAX_NODES / 1e6 : -1;
}

/* The same of what one node delivered; -1 if that is nothing. */
static double node_percentile_ms(int node, double share)
{
    uint64_t count = 0, at = 0;
    for (uint64_t i = 0; i < latency_count; i++)
        count += latencies[i] % MAX_NODES == (uint64_t)node;
    for (uint64_t i = 0, wanted = count ? (uint64_t)((count - 1) * share) : 0; i < latency_count; i++)
        if (latencies[i] % MAX_NODES == (uint64_t)node && at++ == wanted)
            return latencies[i] / MAX_NODES / 1e6;
    return -1;
}

/* By process and by node, in the order of the options. */
static void print_each(const double *cpu_s)
{
    printf("\"process_cpu_s\":[");
    for (int i = 0; i < pids; i++)
        printf("%s%.6f", i ? "," : "", cpu_s[i]);
    printf("],\"nodes\":[");
    for (int i = 0; i < ports; i++)
        printf("%s{\"p50_ms\":%.3f,\"p99_ms\":%.3f}", i ? "," : "", node_percentile_ms(i, 0.5),
               node_percentile_ms(i, 0.99));
    printf("]");
}

static int measure(int listeners)
{
    if (warmup && !run(warmup, rate, listeners))
        fail("the warm-up was not delivered in time; delivered", delivered);
    wait_s(0.3);
    for (int i = 0; i < connections; i++)
        subscribers[i].delivered = 0;
    uint64_t base = delivered, bytes_base = bytes;
    latency_count = 0;
    busy_ns = 0;
    double cpu = server_cpu_s(), cpu_each[MAX_PIDS];
    for (int i = 0; i < pids; i++)
        cpu_each[i] = -process_cpu_s(pid[i]);
    uint64_t begin = now_ns();
    int complete = run(messages, rate, listeners);
    double seconds = (now_ns() - begin) / 1e9, client_busy = busy_ns / 1e9 / seconds;
    cpu = server_cpu_s() - cpu;
    for (int i = 0; i < pids; i++)
        cpu_each[i] += process_cpu_s(pid[i]);
    uint64_t got = delivered - base, got_bytes = bytes - bytes_base;
    wait_s(0.2);                                 /* nothing may come twice */
    int exact = complete && delivered - base == got;
    for (int i = 0; i < connections; i++)
        exact &= subscribers[i].state == STALLED || subscribers[i].delivered == (uint64_t)messages;
    qsort(latencies, latency_count, sizeof *latencies, by_size);
    printf("{\"exact\":%s,\"lost_connections\":%d,\"deliveries\":%llu,\"seconds\":%.4f,\"deliveries_per_s\":%.0f,"
           "\"bytes\":%llu,\"server_cpu_us_per_delivery\":%.4f,\"server_cpu_share\":%.3f,\"client_busy\":%.3f,"
           "\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"samples\":%llu,",
           exact ? "true" : "false", gone, (unsigned long long)got, seconds, got / seconds,
           (unsigned long long)got_bytes, got ? cpu * 1e6 / got : 0, cpu / seconds, client_busy, percentile_ms(0.5),
           percentile_ms(0.99), percentile_ms(1), (unsigned long long)latency_count);
    print_each(cpu_each);
    printf("}\n");
    return exact ? 0 : 1;
}

static void take_options(int count, char **arguments)
{
    for (int i = 1; i + 1 < count; i += 2) {
        const char *name = arguments[i], *value = arguments[i + 1];
        if (!strcmp(name, "--port") && ports < MAX_NODES) port[ports++] = atoi(value);
        else if (!strcmp(name, "--control") && controls < MAX_NODES) control_port[controls++] = atoi(value);
        else if (!strcmp(name, "--path") && paths < MAX_PATHS) path[paths++] = value;
        else if (!strcmp(name, "--connections")) connections = atoi(value);
        else if (!strcmp(name, "--conversations")) conversations = atoi(value);
        else if (!strcmp(name, "--messages")) messages = atol(value);
        else if (!strcmp(name, "--warmup")) warmup = atol(value);
        else if (!strcmp(name, "--rate")) rate = atof(value);
        else if (!strcmp(name, "--publishers")) publishers = atoi(value);
        else if (!strcmp(name, "--window")) window = atoi(value);
        else if (!strcmp(name, "--stall-every")) stall_every = atoi(value);
        else if (!strcmp(name, "--sample-every")) sample_every = atoi(value);
        else if (!strcmp(name, "--in-flight")) in_flight = atoi(value);
        else if (!strcmp(name, "--timeout")) timeout_s = atof(value);
        else if (!strcmp(name, "--hold")) hold_s = atoi(value);
        else if (!strcmp(name, "--pid") && pids < MAX_PIDS) pid[pids++] = atoi(value);
        else if (!strcmp(name, "--dialect"))
            dialect = !strcmp(value, "plain") ? PLAIN : !strcmp(value, "nats") ? NATS
                    : !strcmp(value, "socketio") ? SOCKETIO : !strcmp(value, "nchan") ? NCHAN : BROKER;
        else fail("unknown option", i);
    }
}

int main(int count, char **arguments)
{
    take_options(count, arguments);
    if (!paths)
        path[paths++] = "/{c}";
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    latencies = malloc(LATENCIES_MAX * sizeof *latencies);
    uint64_t begin = now_ns();
    double cpu = server_cpu_s();
    open_subscribers();
    double connecting_s = (now_ns() - begin) / 1e9;
    if (hold_s >= 0) {                            /* memory and reconnection: only be there */
        printf("{\"ready\":%d,\"seconds\":%.4f,\"server_cpu_s\":%.4f}\n", ready, connecting_s, server_cpu_s() - cpu);
        fflush(stdout);
        wait_s(hold_s);
        return gone ? 1 : 0;
    }
    if (dialect == NATS) {
        open_publisher(control_port[0], &publisher, NULL);
        send_all(publisher, "CONNECT {\"verbose\":false}\r\n", 27);
    } else if (dialect == NCHAN) {
        for (int i = 0; i < POSTERS; i++)
            open_publisher(control_port[0], &posters[i].fd, &posters[i]);
    } else {
        for (int i = 0; i < controls; i++)
            open_publisher(control_port[i], &control[i], &control[i]);
    }
    wait_s(0.3);
    return measure(connections - stall_some());
}

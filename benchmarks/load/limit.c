/* The reference: what the kernel itself lets a server deliver.
 *
 *     limit PORT CONTROL_PORT
 *
 * One thread, epoll, one ready-made WebSocket frame per message, one send() per subscriber. It is no WebSocket
 * server: it answers every upgrade with the same constant, reads nothing afterwards, stores, numbers and filters
 * nothing. Subscribers connect to ".../c<number>..."; a line on the control port starts a run:
 *     PUB <conversations> <messages per conversation> <messages per second in all, 0: as fast as possible> <ignored>
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

#define MAX_SOCKETS 32768
#define MAX_CONVERSATIONS 16384
#define REQUEST_BYTES 2048
#define FRAME_TEXT_BYTES 220

enum role { NOTHING, SUBSCRIBER_PORT, CONTROL_PORT, HANDSHAKE, SUBSCRIBER, CONTROL };

struct peer { enum role role; int received; char *request; };
struct conversation { int count, room; int *sockets; };

static struct peer peers[MAX_SOCKETS];
static struct conversation conversations[MAX_CONVERSATIONS];
static int poller;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
}

static void watch(int fd, enum role role)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    peers[fd].role = role;
    peers[fd].received = 0;
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

static void listen_on(int port, enum role role)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
        perror("limit: cannot listen");
        exit(1);
    }
    watch(fd, role);
}

/* Sends all of it, waiting for a peer that is behind: the reference has no queues. */
static void send_all(int fd, const char *bytes, size_t count)
{
    while (count) {
        ssize_t sent = send(fd, bytes, count, MSG_NOSIGNAL);
        if (sent > 0) {
            bytes += sent;
            count -= sent;
        } else if (errno == EAGAIN) {
            struct pollfd writable = {fd, POLLOUT, 0};
            poll(&writable, 1, 1000);
        } else {
            return;
        }
    }
}

static void join(int fd, int number)
{
    struct conversation *joined = &conversations[number % MAX_CONVERSATIONS];
    if (joined->count == joined->room) {
        joined->room = joined->room ? 2 * joined->room : 4;
        joined->sockets = realloc(joined->sockets, joined->room * sizeof *joined->sockets);
    }
    joined->sockets[joined->count++] = fd;
}

static void forget(int fd)
{
    if (peers[fd].role == SUBSCRIBER)
        for (int number = 0; number < MAX_CONVERSATIONS; number++) {
            struct conversation *left = &conversations[number];
            for (int i = 0; i < left->count; i++)
                if (left->sockets[i] == fd)
                    left->sockets[i] = left->sockets[--left->count];
        }
    peers[fd].role = NOTHING;
    close(fd);
}

static size_t make_frame(char *frame, int conversation, long message)
{
    char *text = frame + 4;
    int used = sprintf(text, "{\"sem\":true,\"event\":{\"type\":\"note.said\",\"id\":\"n%09ld\",\"seq\":\"%019llu\","
                       "\"conversation\":\"c%04d\",\"channel\":\"sem\",\"data\":{\"at\":\"@T%019llu\",\"text\":\"",
                       message, (unsigned long long)now_ns(), conversation, (unsigned long long)now_ns());
    memset(text + used, 'x', FRAME_TEXT_BYTES - used - 4);
    memcpy(text + FRAME_TEXT_BYTES - 4, "\"}}}", 4);
    frame[0] = (char)0x81;
    frame[1] = 126;
    frame[2] = (char)(FRAME_TEXT_BYTES >> 8);
    frame[3] = (char)(FRAME_TEXT_BYTES & 255);
    return FRAME_TEXT_BYTES + 4;
}

static void publish(int count, long messages, double rate)
{
    char frame[FRAME_TEXT_BYTES + 64];
    uint64_t begin = now_ns(), published = 0;
    for (long message = 0; message < messages; message++)
        for (int number = 0; number < count; number++, published++) {
            if (rate > 0) {
                uint64_t due = begin + (uint64_t)(published * 1e9 / rate);
                struct timespec at = {due / 1000000000u, due % 1000000000u};
                clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
            }
            size_t bytes = make_frame(frame, number, message);
            struct conversation *audience = &conversations[number];
            for (int i = 0; i < audience->count; i++)
                send_all(audience->sockets[i], frame, bytes);
        }
}

static void accept_from(int listener, enum role role)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
    if (fd < 0)
        return;
    if (fd >= MAX_SOCKETS) {
        close(fd);
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!peers[fd].request)
        peers[fd].request = malloc(REQUEST_BYTES);
    watch(fd, role);
}

static void handshake(int fd)
{
    static const char answer[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                 "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    const char *name = strstr(peers[fd].request, "/c");
    send_all(fd, answer, sizeof answer - 1);
    join(fd, name ? atoi(name + 2) : 0);
    peers[fd].role = SUBSCRIBER;
    free(peers[fd].request);
    peers[fd].request = NULL;
}

static void command(int fd)
{
    int conversations_used = 0;
    long messages = 0;
    double rate = 0;
    sscanf(peers[fd].request, "PUB %d %ld %lf", &conversations_used, &messages, &rate);
    peers[fd].received = 0;
    publish(conversations_used, messages, rate);
    send_all(fd, "DONE\n", 5);
}

static void read_from(int fd)
{
    char thrown_away[4096];
    struct peer *peer = &peers[fd];
    int keep = peer->role != SUBSCRIBER;
    ssize_t got = keep ? recv(fd, peer->request + peer->received, REQUEST_BYTES - 1 - peer->received, 0)
                       : recv(fd, thrown_away, sizeof thrown_away, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        forget(fd);
        return;
    }
    if (!keep)
        return;
    peer->received += got;
    peer->request[peer->received] = 0;
    if (peer->role == HANDSHAKE && strstr(peer->request, "\r\n\r\n"))
        handshake(fd);
    else if (peer->role == CONTROL && strchr(peer->request, '\n'))
        command(fd);
}

int main(int count, char **arguments)
{
    struct epoll_event events[256];
    if (count != 3) {
        fprintf(stderr, "usage: limit PORT CONTROL_PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    listen_on(atoi(arguments[1]), SUBSCRIBER_PORT);
    listen_on(atoi(arguments[2]), CONTROL_PORT);
    for (;;) {
        int ready = epoll_wait(poller, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (peers[fd].role == SUBSCRIBER_PORT)
                accept_from(fd, HANDSHAKE);
            else if (peers[fd].role == CONTROL_PORT)
                accept_from(fd, CONTROL);
            else if (peers[fd].role != NOTHING)
                read_from(fd);
        }
    }
}

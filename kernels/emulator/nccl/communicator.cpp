#include "communicator.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <cstddef>
#include <cstring>
#include <set>

namespace nccl {

std::mutex mutex;

namespace {

// An address without a file, which goes with its socket.
socklen_t address(const std::string& id, int rank, sockaddr_un& to) {
  std::string name = id + "-" + std::to_string(rank);
  to = {};
  to.sun_family = AF_UNIX;
  name.resize(std::min(name.size(), sizeof to.sun_path - 1));
  memcpy(to.sun_path + 1, name.data(), name.size());
  return offsetof(sockaddr_un, sun_path) + 1 + name.size();
}

void let_not_wait(int socket) { fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK); }

}  // namespace

Communicator::Communicator(const char (&bytes)[ID_BYTES], int rank, int ranks)
    : rank(rank), ranks(ranks), sockets(ranks, -1), id(bytes, strnlen(bytes, ID_BYTES)) {
  sockaddr_un own;
  socklen_t length = address(id, rank, own);
  listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener < 0 || bind(listener, (sockaddr*)&own, length) || listen(listener, ranks)) state = SYSTEM_ERROR;
}

Communicator::~Communicator() { close(); }

void Communicator::close() {
  for (int& socket : sockets) {
    if (socket >= 0) ::close(socket);
    socket = -1;
  }
  if (listener >= 0) ::close(listener);
  listener = -1;
}

void Communicator::connect() {
  if (state != IN_PROGRESS) return;
  for (int peer = 0; peer < rank; peer++) {
    if (sockets[peer] >= 0) continue;
    sockaddr_un to;
    socklen_t length = address(id, peer, to);
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (::connect(s, (sockaddr*)&to, length) || write(s, &rank, sizeof rank) != sizeof rank) {
      ::close(s);  // it does not listen yet
      continue;
    }
    let_not_wait(s);
    sockets[peer] = s;
  }
  int s;
  while ((s = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)) >= 0) {
    int peer = -1;
    if (read(s, &peer, sizeof peer) != sizeof peer || peer <= rank || peer >= ranks) {
      ::close(s);
      continue;
    }
    let_not_wait(s);
    sockets[peer] = s;
  }
  int connected = 1;
  for (int socket : sockets) connected += socket >= 0;
  if (connected == ranks) state = SUCCESS;
}

namespace {

Progress move_bytes(int socket, Transfer& t) {
  while (t.moved < t.bytes) {
    char* at = t.data + t.moved;
    size_t left = t.bytes - t.moved;
    ssize_t moved = t.sends ? send(socket, at, left, MSG_NOSIGNAL) : recv(socket, at, left, 0);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return Progress::waits;
    if (moved <= 0) return Progress::broken;
    t.moved += moved;
  }
  return Progress::done;
}

}  // namespace

Progress advance(Communicator& c, std::vector<Transfer>& transfers) {
  Progress all = Progress::done;
  std::set<std::pair<int, bool>> busy;  // sockets and directions in which an earlier message is under way
  for (Transfer& t : transfers) {
    if (t.moved == t.bytes || busy.count({t.peer, t.sends})) continue;
    Progress own = move_bytes(c.sockets[t.peer], t);
    if (own == Progress::broken) return own;
    if (own == Progress::waits) {
      busy.insert({t.peer, t.sends});
      all = Progress::waits;
    }
  }
  return all;
}

}  // namespace nccl

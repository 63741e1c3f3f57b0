// Ranks of a communicator and the sockets between them.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace nccl {

typedef int Result;
enum : Result { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

constexpr size_t ID_BYTES = 128;

struct Communicator {
  int rank, ranks;
  Result state = IN_PROGRESS;  // until all ranks are connected; an error when one is gone
  bool aborted = false;
  uint64_t groups = 0, done = 0;  // operations run in the order in which they were called, whatever their streams
  std::vector<int> sockets;       // by rank, -1 for its own

  // Each rank listens at a name made of `id` and its number; of two ranks the greater connects to the other.
  Communicator(const char (&id)[ID_BYTES], int rank, int ranks);
  ~Communicator();
  // Connects to whom it can.
  void connect();
  void close();

 private:
  std::string id;
  int listener = -1;
};

// One side of a message between two ranks. Bytes of several go through the same socket in order.
struct Transfer {
  int peer;
  bool sends;
  char* data;
  size_t bytes, moved = 0;
};

enum class Progress { done, waits, broken };
// Moves as many bytes as the sockets take and have.
Progress advance(Communicator&, std::vector<Transfer>&);

// Communicators are used by streams and by callers.
extern std::mutex mutex;

}  // namespace nccl

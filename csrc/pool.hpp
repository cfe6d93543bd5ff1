// A team of threads that lives as long as the model. A step is one job; its phases are separated by barriers that spin
// first and sleep later, because waking a sleeper costs more than most phases take.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace native {

long process_id();

// Holds a flag that one thread at a time may hold. A child forked while a thread held it does not wait for that thread,
// which it does not have.
class Busy {
 public:
  explicit Busy(std::atomic<long>& flag);
  ~Busy() { flag_.store(0, std::memory_order_release); }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  std::atomic<long>& flag_;  // the process that holds it, or 0
};

// Waits until a word is no longer `old`: spins, then sleeps. While it spins it yields the CPU where a thread of this
// process's pools was last seen on the same one, or one of its own pool is being woken and may come there, and not
// otherwise: Linux from 6.18 on takes a yield for a slice of time that is not wanted, so whatever else comes to that CPU for
// a moment keeps it for 3 ms, in which the whole pool waits. Where the system does not say which CPU this is, it yields.
class Gate {
 public:
  explicit Gate(std::atomic<int>& sleepers) : sleepers_(sleepers) {}
  uint32_t value() const { return word_.load(std::memory_order_acquire); }
  std::chrono::nanoseconds wait_while(uint32_t old);  // how long it took, or 0 for a few microseconds
  void advance();  // changes the word and wakes the sleepers

 private:
  std::atomic<uint32_t> word_{0};
  std::atomic<int>& sleepers_;  // of all gates of a pool
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Whether the threads of a team are about equally fast: whether one seldom waits long for another after a phase that could
// have been one piece for each. (Where it could not they help each other, and in a long phase a long wait says little.)
class Evenness {
 public:
  static constexpr std::chrono::microseconds kLongWait{10};  // several times what it costs a phase that threads help

  bool even() const { return score_ < kUneven; }
  // By the last thread to arrive at a barrier, before the others go on, so that all threads of a phase see the same. All of
  // them read it in every phase, so it is written only where it changes.
  void judge(bool waited_long) {
    if (waited_long) {
      score_ = std::min(score_ + kWeight, kMost);
    } else if (score_ > 0) {
      --score_;
    }
  }

 private:
  static constexpr int kWeight = 9;   // helping pays from about one long wait in so many phases on
  static constexpr int kUneven = 16;  // more than one wait
  static constexpr int kMost = 256;   // quiet phases at most, until uneven threads try again

  int score_ = 0;
};

// What a job sees of the threads that run it.
class Team {
 public:
  static constexpr int64_t kMostShares = 64;  // with more threads nobody owns a share, and all help

  Team(int size, std::atomic<int>& sleepers) : size_(size), gate_(sleepers) {}
  int size() const { return size_; }
  // With which of `shares` shares a thread begins.
  int64_t own_share(int thread, int64_t shares) const { return thread * shares / size_; }

  // Calls body(begin, end) for pieces of [0, count) on whichever thread is free, then waits for all threads. A piece is
  // half of a thread's share of what is left, so that nobody begins a long one at the end, and `most` at most. Which thread
  // runs it is chance, so a body's results must not depend on it.
  template <class Body>
  void for_each(int64_t count, int64_t most, Body&& body) {
    take(next_[0].value, count, most, 2 * size_, body);
    barrier();
  }

  // The same for each of `shares` shares, of size(share) each, the same on all threads, by body(share, begin, end). A thread
  // begins with a share of its own, always the same one, and helps with the others when nothing of it is left. But a locked
  // instruction, which taking a piece is, waits on x86 until all that the thread wrote is in the cache. So while the
  // threads are even, and each has a share of its own, a share that can be one piece is one, and nobody else's.
  template <class Size, class Body>
  void for_each_share(int thread, int64_t shares, int64_t most, Size&& size, Body&& body) {
    const int64_t own = own_share(thread, shares), halves = std::max<int64_t>(2 * size_ / shares, 2);
    const bool alone = shares == size_ && evenness_.even();
    const bool one_piece = size(own) <= most;
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t share = (own + i) % shares, count = size(share);
      if (!alone || count > most) {
        take(next_[share].value, count, most, halves, [&](int64_t begin, int64_t end) { body(share, begin, end); });
      } else if (i == 0 && count > 0) {
        body(share, int64_t{0}, count);
      }
    }
    barrier(shares, one_piece);
  }
  // Waits for all threads. `judged`: how long this one waits says whether they are even.
  void barrier(int64_t shares = 1, bool judged = false);

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> value{0};
  };

  template <class Body>
  static void take(std::atomic<int64_t>& next, int64_t count, int64_t most, int64_t halves, Body&& body) {
    for (int64_t begin = next.load(std::memory_order_relaxed); begin < count;) {
      const int64_t end = begin + std::clamp<int64_t>((count - begin) / halves, 1, most);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  }

  const int size_;
  Evenness evenness_;
  std::atomic<bool> waited_long_{false};  // somebody, at the last barrier
  Next next_[kMostShares];
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) Gate gate_;
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs job(team, thread) on every thread, the caller being thread 0, and returns when all are done. The job must not
  // throw. In a forked child, where only the forking thread lives on, the other threads are made anew.
  template <class Job>
  void run(Job&& job) {
    using Plain = std::remove_reference_t<Job>;
    start([](void* context, Team& team, int thread) { (*static_cast<Plain*>(context))(team, thread); }, &job);
  }

 private:
  using Function = void (*)(void*, Team&, int);
  struct State;

  void start(Function function, void* context);
  std::unique_ptr<State> make() const;
  void forget_if_forked();

  const int size_;
  std::unique_ptr<State> state_;
};

}  // namespace native

// Where the threads of this process's pools are, for those of them that wait: does another need the CPU that I am on?
#pragma once

#include <atomic>

#if defined(__linux__)
#include <sched.h>
#endif

namespace native {

// A thread's place in the table of all threads that run jobs of pools, those that call a pool included.
class Place {
 public:
  Place() {
    for (int i = 0; i < kMost && index_ < 0; ++i) {
      bool is_taken = false;
      if (taken_[i].compare_exchange_strong(is_taken, true)) index_ = i;
    }
    int used = used_.load();
    while (used <= index_ && !used_.compare_exchange_weak(used, index_ + 1)) {
    }
  }
  ~Place() {
    if (index_ < 0) return;
    leave();
    taken_[index_].store(false);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  void note() const { set(here()); }
  void leave() const { set(kNowhere); }  // goes to sleep, and may come back elsewhere

  // Whether another thread was last seen where this one was, or no one can say.
  bool shared() const {
    const int cpu = index_ < 0 ? kNowhere : seen_on_[index_].load(std::memory_order_relaxed);
    if (cpu == kNowhere) return true;
    const int used = used_.load(std::memory_order_relaxed);
    for (int i = 0; i < used; ++i) {
      if (i != index_ && seen_on_[i].load(std::memory_order_relaxed) == cpu) return true;
    }
    return false;
  }

  // For a forked child, which has this thread and no other.
  void forget_the_others() const {
    for (int i = 0; i < kMost; ++i) {
      if (i == index_) continue;
      seen_on_[i].store(kNowhere, std::memory_order_relaxed);
      taken_[i].store(false);
    }
  }

 private:
  static constexpr int kMost = 1024;     // threads; who finds no place yields wherever it is
  static constexpr int kNowhere = 0;     // asleep, or the system does not say; else 1 + a CPU
  static inline std::atomic<bool> taken_[kMost] = {};
  static inline std::atomic<int> seen_on_[kMost] = {};
  static inline std::atomic<int> used_{0};  // places, at most

  static int here() {
#if defined(__linux__)
    return 1 + sched_getcpu();  // 0 where it fails
#else
    return kNowhere;
#endif
  }

  void set(int cpu) const {
    if (index_ >= 0 && seen_on_[index_].load(std::memory_order_relaxed) != cpu) {
      seen_on_[index_].store(cpu, std::memory_order_relaxed);
    }
  }

  int index_ = -1;
};

}  // namespace native

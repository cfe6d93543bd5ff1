#include "pool.hpp"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#include "place.hpp"

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace native {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 100;                            // between two looks at the clock: 1 to 4 us on x86
constexpr auto kAwake = std::chrono::milliseconds(2);  // longer than Python needs between two steps

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

thread_local const Place place;

// While a job runs: numbers are rounded to nearest and denormals are numbers, whatever the thread that calls has set for
// its own sums or handed on to the threads that it made. Else a row's bits would depend on which thread worked on it.
class PlainNumbers {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  PlainNumbers() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainNumbers() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#elif defined(__aarch64__) && !defined(_MSC_VER)
  PlainNumbers() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~PlainNumbers() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  PlainNumbers() {}
#endif
};

}  // namespace

long process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

Busy::Busy(std::atomic<long>& flag) : flag_(flag) {
  const long self = process_id();
  for (;;) {
    long holder = 0;
    if (flag_.compare_exchange_strong(holder, self, std::memory_order_acquire)) return;
    if (holder != self && flag_.compare_exchange_strong(holder, self, std::memory_order_acquire)) return;
    std::this_thread::yield();
  }
}

std::chrono::nanoseconds Gate::wait_while(uint32_t old) {
  const auto start = Clock::now();
  auto now = start;
  do {
    for (int i = 0; i < kSpins; ++i) {
      if (word_.load(std::memory_order_acquire) != old) return now - start;
      pause();
    }
    place.note();
    if (sleepers_.load(std::memory_order_relaxed) > 0 || place.shared()) std::this_thread::yield();
    now = Clock::now();
  } while (now - start < kAwake);
  // The sleeper announces itself before it looks, the waker changes the word before it looks: one of them sees the
  // other, in the one order that sequential consistency gives.
  sleepers_.fetch_add(1);
  place.leave();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return word_.load() != old; });
  }
  place.note();
  sleepers_.fetch_sub(1);
  return Clock::now() - start;
}

void Gate::advance() {
  word_.fetch_add(1);
  if (sleepers_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // whoever checked the word before is asleep by now
    wake_.notify_all();
  }
}

void Team::barrier(int64_t shares, bool judged) {
  place.note();
  const uint32_t phase = gate_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    for (int64_t share = 0; share < shares; ++share) {
      auto& next = next_[share].value;
      if (next.load(std::memory_order_relaxed)) next.store(0, std::memory_order_relaxed);
    }
    const bool waited_long = waited_long_.load(std::memory_order_relaxed);
    if (waited_long) waited_long_.store(false, std::memory_order_relaxed);
    evenness_.judge(waited_long);
    gate_.advance();
  } else if (gate_.wait_while(phase) > Evenness::kLongWait && judged) {
    waited_long_.store(true, std::memory_order_relaxed);
  }
}

struct Pool::State {
  explicit State(int size) : team(size, sleepers) {}

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      begin.wait_while(seen);
      ++seen;
      if (stop) return;
      run(thread);
    }
  }

  void run(int thread) {
    const PlainNumbers plain;
    function(context, team, thread);
    team.barrier();
  }

  std::atomic<int> sleepers{0};
  Team team;
  Gate begin{sleepers};
  Function function = nullptr;
  void* context = nullptr;
  bool stop = false;
  long owner = process_id();
  std::vector<std::thread> threads;
};

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads), state_(make()) {}

std::unique_ptr<Pool::State> Pool::make() const {
  auto state = std::make_unique<State>(size_);
  State* raw = state.get();
  try {
    for (int thread = 1; thread < size_; ++thread) {
      state->threads.emplace_back([raw, thread] { raw->work(thread); });
    }
  } catch (const std::system_error& error) {  // the system has no more threads: end those that there are
    raw->stop = true;
    raw->begin.advance();
    for (auto& thread : raw->threads) thread.join();
    throw std::runtime_error("thread " + std::to_string(raw->threads.size() + 2) + " of " + std::to_string(size_) +
                             " could not be started: " + error.what());
  }
  return state;
}

void Pool::forget_if_forked() {
  // The parent's threads do not exist here and its locks may be held for ever, so the old state cannot be destroyed.
  if (!state_ || state_->owner == process_id()) return;
  (void)state_.release();
  place.forget_the_others();
}

Pool::~Pool() {
  forget_if_forked();
  if (!state_) return;
  state_->stop = true;
  state_->begin.advance();
  for (auto& thread : state_->threads) thread.join();
}

void Pool::start(Function function, void* context) {
  forget_if_forked();
  if (!state_) state_ = make();
  state_->function = function;
  state_->context = context;
  place.note();
  state_->begin.advance();
  state_->run(0);
}

}  // namespace native

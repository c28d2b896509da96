// The thread pool that all operators share, so that no two of them compete for the cores, and the scratch memory of a
// thread.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace kernels {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  static constexpr int MAX_THREADS = 1 << 16;

  explicit Pool(int size) : size_(size) {
    try {
      for (int t = 1; t < size; ++t) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // The system allows no more threads. Those that exist do all the shares.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // Calls f(0) .. f(size - 1) and returns when all calls have ended. The first exception of a call is rethrown then. A
  // thread takes the next share when it is free: where another program occupies a core, the other threads do its share.
  void run(const std::function<void(int)>& f) {
    if (size_ == 1) return f(0);
    long round;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &f;
      error_ = nullptr;
      finished_.store(0);
      round = ++round_;
      next_.store(round * MAX_THREADS);
    }
    wake_.notify_all();
    take_shares(round);
    for (int spin = 0; finished_.load(std::memory_order_acquire) < size_ && spin < 20000; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return finished_.load() == size_; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void take_shares(long round) {
    for (;;) {
      long share = next_.load(std::memory_order_acquire);
      if (share < round * MAX_THREADS || share >= round * MAX_THREADS + size_)
        return;  // all are taken, or a later round runs
      if (!next_.compare_exchange_weak(share, share + 1)) continue;
      try {
        (*task_)(static_cast<int>(share - round * MAX_THREADS));
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (finished_.fetch_add(1) + 1 == size_) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  void work() {
    for (long seen = 0;;) {
      for (int spin = 0; round_.load(std::memory_order_acquire) == seen && spin < 2000; ++spin) pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      take_shares(seen);
    }
  }

  const int size_;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic<long> round_{0}, next_{0};  // next_: the next share, counted from round * MAX_THREADS
  std::atomic<int> finished_{0};
  std::vector<std::thread> workers_;  // last, so that the threads start when all members exist
};

inline std::mutex pool_mutex;         // held while a pool runs, and during a fork
inline Pool* current_pool = nullptr;  // made at first use; its threads outlive main, so no destructor ends it
inline std::atomic<int> thread_count{1};

// A child process has no workers: it makes its own pool at first use. The locks of the parent's pool may be held for ever,
// so that pool is left as it is. The fork waits until no operator uses the pool.
inline const int fork_handlers = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                                [] {
                                                  current_pool = nullptr;
                                                  pool_mutex.unlock();
                                                });

inline int threads() { return thread_count; }

// No operator may run meanwhile.
inline void use_threads(int count) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  delete std::exchange(current_pool, nullptr);
  thread_count = std::clamp(count, 1, Pool::MAX_THREADS - 1);
}

// f(0) .. f(threads() - 1), in parallel
inline void parallel(const std::function<void(int)>& f) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!current_pool) current_pool = new Pool(threads());
  current_pool->run(f);
}

// f(begin, end) for consecutive ranges that cover 0 .. n - 1, one for each thread
template <class F>
void parallel_for(long n, F f) {
  const int count = threads();
  parallel([&](int t) {
    const long begin = n * t / count, end = n * (t + 1) / count;
    if (begin < end) f(begin, end);
  });
}

// f(i) for 0 .. n - 1, in vectors
template <class F>
void elementwise(long n, F f) {
  parallel_for(n, [&](long begin, long end) {
#pragma omp simd
    for (long i = begin; i < end; ++i) f(i);
  });
}

// Scratch memory of the calling thread, at least `floats` long, with any content. It is returned at the end of the scope and
// then serves the next Buffer, so that operators do not allocate at each call.
class Buffer {
 public:
  explicit Buffer(long floats) {
    Stack& stack = this_threads();
    if (stack.used == stack.blocks.size()) stack.blocks.emplace_back();
    std::vector<float>& block = stack.blocks[stack.used];
    if (static_cast<long>(block.size()) < floats) block.assign(floats, 0.f);
    data_ = block.data();
    ++stack.used;
  }
  ~Buffer() { --this_threads().used; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data_; }

 private:
  struct Stack {
    std::vector<std::vector<float>> blocks;
    size_t used = 0;
  };
  static Stack& this_threads() {
    thread_local Stack stack;
    return stack;
  }
  float* data_;
};

}  // namespace kernels

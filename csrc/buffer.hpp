// Memory for weights, cache and activations: zeroed, 64-byte aligned, on huge pages where the system allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace native {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    if (bytes <= 0) return;
#if defined(__linux__)
    if (bytes >= kHuge) {
      // Room to align by hand: mmap promises a small page only, and a huge page needs its own alignment.
      mapped_bytes_ = bytes + kHuge;
      mapped_ = mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped_ == MAP_FAILED) {
        mapped_ = nullptr;
        throw std::bad_alloc();
      }
      auto address = reinterpret_cast<uintptr_t>(mapped_);
      address = (address + kHuge - 1) / kHuge * kHuge;
      data_ = reinterpret_cast<uint8_t*>(address);
      madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish: small pages work too
      return;
    }
#endif
    data_ = static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlign)));
    std::memset(data_, 0, static_cast<size_t>(bytes));
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    swap(taken);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(__linux__)
    if (mapped_) {
      munmap(mapped_, static_cast<size_t>(mapped_bytes_));
      return;
    }
#endif
    if (data_) ::operator delete(data_, std::align_val_t(kAlign));
  }

  // Makes room for at least this many bytes; what was there is lost when it has to grow.
  void reserve(int64_t bytes) {
    if (bytes > bytes_) {
      *this = Buffer();  // the old one goes before the new one comes
      *this = Buffer(bytes);
    }
  }
  int64_t bytes() const { return bytes_; }
  uint8_t* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  static constexpr int64_t kHuge = 2 << 20;
  static constexpr size_t kAlign = 64;

  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }

  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  void* mapped_ = nullptr;
  int64_t mapped_bytes_ = 0;
};

}  // namespace native

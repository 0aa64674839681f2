// Large memory that is used again and again: fresh pages would cost a training step up to a fifth
// of its time. What was given back last, up to a quarter of all memory, waits here for the next to
// ask for its size.
#pragma once

#include <cstddef>

namespace fastrssm::cpu {

class Buffer {
 public:
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_, kept_bytes_;
};

}  // namespace fastrssm::cpu

#include "cpu/buffer.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastrssm::cpu {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr int kKept = 2;

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// never destroyed: tensors may outlive every static object
struct Pool {
  std::mutex mutex;
  Block blocks[kKept];  // the one given back last comes first
};
Pool& pool() {
  static Pool* const kPool = new Pool;
  return *kPool;
}

void* take(std::size_t bytes) {
  const std::lock_guard lock(pool().mutex);
  for (Block& block : pool().blocks) {
    if (block.data && block.bytes == bytes) return std::exchange(block, {}).data;
  }
  return nullptr;
}

void give_back(Block given) {
  {
    const std::lock_guard lock(pool().mutex);
    for (Block& block : pool().blocks) std::swap(block, given);
  }
  std::free(given.data);
}

}  // namespace

Buffer::Buffer(std::size_t bytes)
    : bytes_(bytes), kept_bytes_((bytes + kLargePage - 1) / kLargePage * kLargePage) {
  data_ = take(kept_bytes_);
  if (data_) return;
  data_ = std::aligned_alloc(kLargePage, kept_bytes_);
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  // a refusal costs time and nothing else
  (void)madvise(data_, kept_bytes_, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { give_back({data_, kept_bytes_}); }

}  // namespace fastrssm::cpu

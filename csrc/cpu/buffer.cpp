#include "cpu/buffer.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastrssm::cpu {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr std::size_t kMostKept = std::size_t{2} << 30;

struct Block {
  void* data;
  std::size_t bytes;
};

// never destroyed: tensors may outlive every static object
struct Pool {
  std::mutex mutex;
  std::list<Block> blocks;  // the one given back last comes first
  std::size_t bytes = 0;
};
Pool& pool() {
  static Pool* const kPool = new Pool;
  return *kPool;
}

void* take(std::size_t bytes) {
  const std::lock_guard lock(pool().mutex);
  auto& blocks = pool().blocks;
  for (auto block = blocks.begin(); block != blocks.end(); ++block) {
    if (block->bytes != bytes) continue;
    void* const data = block->data;
    pool().bytes -= bytes;
    blocks.erase(block);
    return data;
  }
  return nullptr;
}

void give_back(Block given) {
  const std::lock_guard lock(pool().mutex);
  auto& blocks = pool().blocks;
  blocks.push_front(given);
  pool().bytes += given.bytes;
  while (pool().bytes > kMostKept) {
    pool().bytes -= blocks.back().bytes;
    std::free(blocks.back().data);
    blocks.pop_back();
  }
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

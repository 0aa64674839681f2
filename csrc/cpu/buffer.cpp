#include "cpu/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

namespace fastrssm::cpu {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

// A quarter of the machine's memory, at most 8 GiB: an update of a large batch needs some GiB, and
// fresh pages cost a fifth of its time.
std::size_t most_kept() {
  constexpr std::size_t kGibi = std::size_t{1} << 30;
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
  if (pages <= 0 || size <= 0) return 2 * kGibi;
  return std::min(static_cast<std::size_t>(pages) / 4 * static_cast<std::size_t>(size), 8 * kGibi);
}

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
  static const std::size_t kMostKept = most_kept();
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

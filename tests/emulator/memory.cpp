// Every access of a kernel to memory, as the compiler's instrumentation for thread sanitizers reports it: whether the
// address is one that the kernel may touch, and whether accesses to shared memory are ordered by synchronisation.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emulator {

std::vector<Buffer> buffers;
bool unwritten_allowed;

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every float
constexpr size_t kPitch = 256 << 10;     // of the blocks' dynamic shared memory

// Who accessed a byte: a thread of the cluster, or several.
struct Who {
  unsigned short lane : 5, warp : 5, rank : 4, several : 2;  // several: 1 lanes of the warp, 2 warps, 3 blocks
};

// What is known of a byte of shared memory.
struct Seen {
  Time written, read;  // when last
  Who writer, reader;
  bool atomic, under_way;  // the write; a copy to here has been asked for and not waited for
};

const char *own_from, *own_to;
std::vector<std::pair<const char*, const char*>> module_segments;

char* static_from;  // what is __shared__ and not dynamic, of all kernels
size_t static_size;
thread_local char anchor;  // makes sure that there is some of it

template <typename T>
T* reserve(size_t count) {
  return static_cast<T*>(mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// For each block of a cluster: its dynamic shared memory, its static shared memory while another block runs.
char* dynamic_base() {
  static char* base = reserve<char>(kMostBlocks * kPitch);
  return base;
}

size_t parked_pitch() { return (static_size + 127) & -128; }  // it keeps what is aligned aligned

char* parked_base() {
  static char* base = reserve<char>(kMostBlocks * parked_pitch());
  return base;
}

Seen* seen_base() {  // first of the static, then of the dynamic shared memory of each block
  static Seen* base = reserve<Seen>(kMostBlocks * (static_size + kPitch));
  return base;
}

// A place in shared memory.
struct Place {
  unsigned rank;
  size_t at, size;  // in the static or dynamic part of that size
  bool dynamic;

  Seen* seen() const { return seen_base() + rank * (static_size + kPitch) + (dynamic ? static_size : 0) + at; }
};

bool within(const void* p, const char* from, size_t size) { return size_t(static_cast<const char*>(p) - from) < size; }

bool find_shared(const void* p, Place& place) {
  const auto* at = static_cast<const char*>(p);
  if (within(p, static_from, static_size)) {
    place = {active->rank, size_t(at - static_from), static_size, false};
  } else if (within(p, dynamic_base(), kMostBlocks * kPitch)) {
    const size_t offset = at - dynamic_base();
    place = {unsigned(offset / kPitch), offset % kPitch, launched.shared, true};
  } else if (within(p, parked_base(), kMostBlocks * parked_pitch())) {
    const size_t offset = at - parked_base();
    place = {unsigned(offset / parked_pitch()), offset % parked_pitch(), static_size, false};
  } else {
    return false;
  }
  return true;
}

Who me() { return {(unsigned short)current->lane, (unsigned short)current->warp->number, (unsigned short)current->rank, 0}; }

// Whether what `who` did at `time` is ordered before what the thread that runs does now.
bool ordered(Time time, Who who) {
  if (time < cluster.synced) return true;
  if (who.several == 3 || who.rank != current->rank) return false;
  if (time < current->in->synced) return true;
  if (who.several == 2 || who.warp != current->warp->number) return false;
  return time < current->warp->synced || (who.several == 0 && who.lane == current->lane);
}

// Add the thread that runs to those who did something that is not ordered with it.
Who joined(Who others) {
  const Who mine = me();
  if (others.rank != mine.rank)
    others.several = 3;
  else if (others.several < 2 && others.warp != mine.warp)
    others.several = 2;
  else if (others.several == 0 && others.lane != mine.lane)
    others.several = 1;
  return others;
}

void record(Time& time, Who& who) {
  who = time < cluster.started || ordered(time, who) ? me() : joined(who);
  time = now;
}

std::string name_of(Who who) {
  const std::string block = cluster.size > 1 ? " of block " + std::to_string(who.rank) + " of the cluster" : "";
  const std::string warp = std::to_string(who.warp);
  if (who.several == 3) return "threads of several blocks";
  if (who.several == 2) return "threads of several warps" + block;
  if (who.several == 1) return "lanes of warp " + warp + block;
  return "thread " + std::to_string(32 * who.warp + who.lane) + block;
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates";
}

std::string name_of(const Place& place, size_t index) {
  std::string text = "byte " + std::to_string(place.at + index) + (place.dynamic ? " of dynamic" : " of static");
  text += " shared memory";
  if (cluster.size > 1) text += " of block " + std::to_string(place.rank) + " of the cluster";
  return text;
}

void access_shared(const Place& place, size_t size, Access access, const void* pc) {
  if (place.at + size > place.size)
    fail(std::string(verb(access)) + " " + std::to_string(size) + " bytes from " + name_of(place, 0) + ", which has " +
             std::to_string(place.size),
         pc);
  if (place.rank != current->rank && cluster.blocks[place.rank].done)
    fail(std::string(verb(access)) + " " + name_of(place, 0) + ", a block that may have ended", pc);
  Seen* seen = place.seen();
  for (size_t i = 0; i < size; ++i) {
    Seen& s = seen[i];
    const bool written = s.written >= cluster.started;
    const auto race = [&](Who who, const char* what) {
      fail("race: " + std::string(verb(access)) + " " + name_of(place, i) + ", which " + name_of(who) + " " + what +
               ", with no synchronisation between",
           pc);
    };
    if (written) {
      if (s.under_way)
        fail(std::string(verb(access)) + " " + name_of(place, i) + " while a copy to there by " + name_of(s.writer) +
                 " is under way: no wait_for_copies before",
             pc);
      if (!(access == Access::atomic && s.atomic) && !ordered(s.written, s.writer)) race(s.writer, "wrote");
    } else if (access == Access::read && !unwritten_allowed) {
      fail("reads " + name_of(place, i) + ", which nobody has written", pc);
    }
    if (access == Access::read) {
      record(s.read, s.reader);
    } else {
      if (s.read >= cluster.started && !ordered(s.read, s.reader)) race(s.reader, "read");
      if (access == Access::atomic && written && s.atomic)
        record(s.written, s.writer);
      else
        s.written = now, s.writer = me();
      s.atomic = access == Access::atomic;
      s.under_way = false;
    }
  }
}

void access_global(const char* p, size_t size, Access access, const void* pc) {
  const Buffer* near = nullptr;
  for (const Buffer& buffer : buffers) {
    if (p >= buffer.data && p + size <= buffer.data + buffer.size) {
      if (access != Access::read && !buffer.writable)
        fail(std::string(verb(access)) + " " + buffer.name + ", which is not its to write", pc);
      if (launched.early && buffer.writable && !current->has_waited)
        fail(std::string(verb(access)) + " " + buffer.name + " before wait_for_previous, in a kernel launched early", pc);
      return;
    }
    const auto distance = [&](const Buffer& b) { return p < b.data ? b.data - p : p - b.data; };
    if (!near || distance(buffer) < distance(*near)) near = &buffer;
  }
  if (within(p, static_cast<const char*>(launched.arguments), launched.arguments_size)) return;
  for (const auto& [from, to] : module_segments)
    if (p >= from && p + size <= to) return;
  std::string text = std::string(verb(access)) + " " + std::to_string(size) + " bytes outside all buffers";
  if (p < reinterpret_cast<const char*>(4096)) text += ", near null";
  else if (near)
    text += ", at " + std::to_string(p - near->data) + " of " + near->name + ", which has " + std::to_string(near->size);
  fail(text, pc);
}

}  // namespace

char* dynamic_shared(unsigned rank) { return dynamic_base() + rank * kPitch; }

void poison_shared() {
  std::memset(static_from, kPoison, static_size);
  for (unsigned b = 0; b < cluster.size; ++b) {
    if (b) std::memset(parked_base() + b * parked_pitch(), kPoison, static_size);
    std::memset(dynamic_shared(b), kPoison, launched.shared);
  }
}

void swap_static_shared(Block* from, Block* to) {
  std::memcpy(parked_base() + from->rank * parked_pitch(), static_from, static_size);
  std::memcpy(static_from, parked_base() + to->rank * parked_pitch(), static_size);
}

void set_own(const char* from, const char* to) { own_from = from, own_to = to; }

void find_module() {
  *const_cast<volatile char*>(&anchor) = 0;
  module_segments.clear();
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&find_module), &info);
  dl_iterate_phdr(
      [](dl_phdr_info* loaded, size_t, void* base) {
        if (loaded->dlpi_addr != reinterpret_cast<uintptr_t>(base)) return 0;
        for (int i = 0; i < loaded->dlpi_phnum; ++i) {
          const auto& header = loaded->dlpi_phdr[i];
          const char* from = reinterpret_cast<const char*>(loaded->dlpi_addr + header.p_vaddr);
          if (header.p_type == PT_LOAD) module_segments.emplace_back(from, from + header.p_memsz);
          if (header.p_type == PT_TLS)
            static_from = static_cast<char*>(loaded->dlpi_tls_data), static_size = header.p_memsz;
        }
        return 1;
      },
      info.dli_fbase);
}

void access(const void* p, size_t size, Access access, const void* pc) {
  if (!current) return;  // the handler's own
  const auto* at = static_cast<const char*>(p);
  if (at >= own_from && at < own_to) return;
  Place place;
  if (find_shared(p, place))
    access_shared(place, size, access, pc);
  else
    access_global(at, size, access, pc);
}

void* shared_of(const void* pointer, unsigned rank) {
  Place place;
  if (rank >= cluster.size) fail("maps shared memory of block " + std::to_string(rank) + " of the cluster");
  if (!find_shared(pointer, place)) fail("maps to another block what is not in shared memory");
  if (rank == current->rank) return const_cast<void*>(pointer);
  if (!cluster.phase)
    fail("maps shared memory of block " + std::to_string(rank) +
         " of the cluster before any barrier of the cluster: that block may not have started");
  return (place.dynamic ? dynamic_shared(rank) : parked_base() + rank * parked_pitch()) + place.at;
}

void copy_async(void* to, const void* from, size_t bytes, Site site) {
  const void* pc = __builtin_return_address(0);
  Place place;
  if (!find_shared(to, place) || place.rank != current->rank) fail("copy_async to what is not its shared memory", pc);
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) {
    const std::string size = std::to_string(bytes);
    fail("copy_async of " + size + " bytes that are not aligned to " + size, pc);
  }
  access(from, bytes, Access::read, pc);
  access(to, bytes, Access::write, pc);
  for (size_t i = 0; i < bytes; ++i) place.seen()[i].under_way = true;
  std::memset(to, kPoison, bytes);
  Copy copy = {to, from, {}, bytes, current->committed, site};
  std::memcpy(copy.data, from, bytes);
  current->copies.push_back(copy);
}

void commit_copies() { ++current->committed; }

// It does not matter when the source was read: a copy whose source changes on its way is an error.
void wait_for_copies(unsigned but) {
  auto& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group + but < current->committed; ++done) {
    const Copy& copy = copies[done];
    if (std::memcmp(copy.data, copy.from, copy.bytes))
      fail("the source of a copy has changed before wait_for_copies, " + emulator::name_of(copy.site));
    std::memcpy(copy.to, copy.data, copy.bytes);
    Place place;
    find_shared(copy.to, place);
    for (size_t i = 0; i < copy.bytes; ++i) {
      Seen& seen = place.seen()[i];
      seen.written = now, seen.writer = me(), seen.under_way = false;
    }
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

}  // namespace emulator

// What g++ calls with -fsanitize=thread. We are not a thread sanitizer: the threads are our fibers.
#define PC __builtin_return_address(0)
#define HOOKS(kind, prefix, size)                                                           \
  void __tsan_##prefix##kind##size(void* p) { emulator::access(p, size, emulator::Access::kind, PC); }
#define ALL_HOOKS(kind)                                                                             \
  HOOKS(kind, , 1) HOOKS(kind, , 2) HOOKS(kind, , 4) HOOKS(kind, , 8) HOOKS(kind, , 16)             \
  HOOKS(kind, unaligned_, 2) HOOKS(kind, unaligned_, 4) HOOKS(kind, unaligned_, 8) HOOKS(kind, unaligned_, 16) \
  void __tsan_##kind##_range(void* p, size_t size) { emulator::access(p, size, emulator::Access::kind, PC); }

extern "C" {
ALL_HOOKS(read)
ALL_HOOKS(write)
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

// And with -fsanitize=alignment,bounds.
struct UbsanPlace {
  const char* file;
  unsigned line, column;
};

static void misuse(const UbsanPlace& place, const std::string& what) {
  const std::string text = what + ", " + emulator::name_of(emulator::Site{place.file, int(place.line)});
  if (emulator::current) emulator::fail(text);
  std::fprintf(stderr, "emulator: in a handler: %s\n", text.c_str());
}

void __ubsan_handle_out_of_bounds(const UbsanPlace* place, size_t index) {
  misuse(*place, "index " + std::to_string(int64_t(index)) + " out of an array's bounds");
}

void __ubsan_handle_type_mismatch_v1(const UbsanPlace* place, size_t pointer) {
  misuse(*place, pointer ? "an address that is not aligned as its type" : "a null pointer");
}
}

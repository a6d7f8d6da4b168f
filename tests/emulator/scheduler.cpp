// Threads as fibers: who runs next, collectives, barriers, and what to say when nobody can run.
#include "scheduler.h"

#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <new>

#include "runtime.h"

// Keep the callee-saved registers and the stack pointer of this fiber and go on with another's.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
  .text
  .globl emulator_switch
  .hidden emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch
)");

namespace emulator {

Time now = 1;
Cluster cluster;
Thread* current;
Block* active;
const View* view;
Launch launched;

namespace {

// Stacks lie a little more than a power of two apart, or they would share their places in the processor's caches.
constexpr size_t kStack = (64 << 10) + 576;

Order order = Order::shuffled;
uint64_t seed = 1, state;
void* host;  // its stack pointer while fibers run
Failure failure;
// Whether some thread let the next kernel start before it had waited itself: in the kernel that runs, and the last one.
bool hastes, hasty;

unsigned draw() {  // xorshift64
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 32;
}

bool chance(unsigned of) { return order == Order::shuffled && draw() % of == 0; }

// One of the bits of a mask that is not 0.
unsigned pick(unsigned mask) {
  if (order == Order::forward) return __builtin_ctz(mask);
  if (order == Order::backward) return 31 - __builtin_clz(mask);
  const unsigned turn = draw() % 32;
  return (__builtin_ctz(mask >> turn | mask << (-turn & 31)) + turn) % 32;
}

bool same(Site a, Site b) { return a.line == b.line && !__builtin_strcmp(a.file, b.file); }

void make_ready(Thread& thread) {
  thread.state = State::ready;
  thread.warp->ready |= 1u << thread.lane;
  thread.in->ready |= 1u << thread.warp->number;
}

void rest(Thread& thread, State why) {
  thread.state = why;
  if (!(thread.warp->ready &= ~(1u << thread.lane))) thread.in->ready &= ~(1u << thread.warp->number);
}

Thread* choose() {
  Block* block = active;
  if (!block->ready || (cluster.size > 1 && chance(64))) {
    unsigned blocks = 0;
    for (unsigned b = 0; b < cluster.size; ++b) blocks |= unsigned(cluster.blocks[b].ready != 0) << b;
    if (!blocks) return nullptr;
    block = &cluster.blocks[pick(blocks)];
  }
  if (block != active) swap_static_shared(active, block), active = block;
  block->started = true;
  Warp* warp = current && current->in == block ? current->warp : nullptr;
  if (!warp || !warp->ready || chance(8)) warp = &block->warps[pick(block->ready)];
  return &block->threads[32 * warp->number + pick(warp->ready)];
}

void leave(void** from) {
  current = nullptr, view = nullptr;
  emulator_switch(from, host);
}

// Go on with a thread that can; this one goes on when its turn comes.
void reschedule() {
  Thread* me = current;
  Thread* next = choose();
  if (!next) {
    if (cluster.live && failure.what.empty()) failure = {describe_deadlock(), nullptr, *me};
    leave(&me->stack);
  }
  if (next == me) return;
  current = next, view = next;
  emulator_switch(&me->stack, next->stack);
}

void complete(Warp& warp, Meeting& meeting) {
  const unsigned lanes = meeting.waiting;
  if (meeting.act) meeting.act(warp.slots, lanes);
  meeting.waiting = 0;
  for (unsigned rest = lanes; rest; rest &= rest - 1)
    make_ready(current->in->threads[32 * warp.number + __builtin_ctz(rest)]);
}

bool all_here(const Warp& warp, const Meeting& meeting) {
  return meeting.waiting && !(meeting.mask & warp.live & ~meeting.waiting);
}

void complete_block(Block& block) {
  block.waiting = 0;
  block.synced = ++now;
  bool has_waited = false;
  for (unsigned t = 0; t < launched.block.x; ++t) has_waited |= block.threads[t].has_waited;
  for (unsigned t = 0; t < launched.block.x; ++t) {
    Thread& thread = block.threads[t];
    if (thread.state == State::at_block) make_ready(thread);
    thread.has_waited = has_waited;
  }
}

void complete_cluster() {
  cluster.arrived = 0, ++cluster.phase;
  if (!cluster.relaxed) cluster.synced = ++now;
  cluster.relaxed = false;
  for (unsigned b = 0; b < cluster.size; ++b)
    for (unsigned t = 0; t < launched.block.x; ++t) {
      Thread& thread = cluster.blocks[b].threads[t];
      if (thread.state == State::at_cluster) make_ready(thread);
    }
}

// Without this thread others may have all they wait for.
void finish() {
  Thread& me = *current;
  Block& block = *me.in;
  if (launched.early && !me.has_waited) fail("returns without wait_for_previous, in a kernel launched early");
  rest(me, State::done);
  me.warp->live &= ~(1u << me.lane);
  --block.live, --cluster.live;
  block.done = !block.live;
  for (Meeting& meeting : me.warp->meetings)
    if (all_here(*me.warp, meeting)) complete(*me.warp, meeting);
  if (block.live && block.waiting == block.live) complete_block(block);
  if (me.arrived && me.phase == cluster.phase) --cluster.arrived;
  if (cluster.live && cluster.arrived == cluster.live) complete_cluster();
  reschedule();
  __builtin_unreachable();
}

void fiber() {
  launched.invoke(launched);
  finish();
}

std::string threads_of(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (end > i + 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace

std::string name_of(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string name_of(const Thread& thread) {
  const auto [x, y, z] = thread.in->index;
  return "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "), thread " +
         std::to_string(thread.number);
}

std::string describe_deadlock() {
  std::string text = "deadlock:";
  for (unsigned b = 0; b < cluster.size; ++b) {
    Block& block = cluster.blocks[b];
    std::map<std::string, std::vector<unsigned>> places;
    for (unsigned t = 0; t < launched.block.x; ++t) {
      const Thread& thread = block.threads[t];
      places[thread.state == State::done ? "have returned"
                                         : std::string("wait at ") + thread.what + " (" + name_of(thread.site) + ")"]
          .push_back(t);
    }
    if (cluster.size > 1) text += " block " + std::to_string(b) + " of the cluster:";
    for (const auto& [place, numbers] : places) text += " threads " + threads_of(numbers) + " " + place + ";";
  }
  text.pop_back();
  return text;
}

void begin_launch() { hasty = hastes, hastes = false; }

void set_order(Order new_order, uint64_t new_seed) { order = new_order, seed = new_seed; }

std::string describe_order() {
  return order == Order::shuffled ? "seed " + std::to_string(seed) : order == Order::forward ? "forward" : "backward";
}

std::vector<unsigned> order_of(unsigned count) {
  state = seed * 0x9e3779b97f4a7c15u + 0x1234567;
  if (!state) state = 1;
  std::vector<unsigned> all(count);
  for (unsigned i = 0; i < count; ++i) all[i] = order == Order::backward ? count - 1 - i : i;
  if (order == Order::shuffled)
    for (unsigned i = count; i > 1; --i) std::swap(all[i - 1], all[draw() % i]);
  return all;
}

void fail(const std::string& what, const void* pc) {
  failure = {what, pc, *current};
  leave(&current->stack);
  __builtin_unreachable();
}

Failure run_cluster(unsigned first) {
  const unsigned threads = launched.block.x;
  static Thread* all;  // before the stacks, so that both are memory of the threads' own
  static char* stacks;
  static size_t room;
  const size_t needed = size_t(threads) * launched.cluster;
  if (needed > room) {
    if (all) {
      for (size_t i = 0; i < room; ++i) all[i].~Thread();
      munmap(all, room * (sizeof(Thread) + kStack));
    }
    room = needed;
    all = static_cast<Thread*>(mmap(nullptr, room * (sizeof(Thread) + kStack), PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < room; ++i) new (all + i) Thread;
    stacks = reinterpret_cast<char*>(all + room);
    set_own(reinterpret_cast<char*>(all), stacks + room * kStack);
  }
  failure = {};
  cluster.size = launched.cluster, cluster.live = needed;
  cluster.arrived = cluster.phase = 0, cluster.relaxed = false;
  cluster.synced = cluster.started = ++now;
  for (unsigned b = 0; b < launched.cluster; ++b) {
    Block& block = cluster.blocks[b];
    const unsigned at = first + b;
    block.rank = b;
    block.index = {at % launched.grid.x, at / launched.grid.x % launched.grid.y, at / launched.grid.x / launched.grid.y};
    block.started = block.done = false;
    block.live = threads, block.waiting = 0, block.ready = 0, block.synced = now;
    block.threads = &all[size_t(b) * threads];
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = block.threads[t];
      Warp& warp = block.warps[t / 32];
      if (t % 32 == 0) {
        warp.number = t / 32, warp.live = warp.ready = 0, warp.synced = now;
        for (Meeting& meeting : warp.meetings) meeting.waiting = 0;
      }
      thread.thread = {t, 0, 0}, thread.block = block.index;
      thread.lane = t % 32, thread.rank = b, thread.blocks_of_cluster = cluster.size;
      thread.shared = dynamic_shared(b);
      thread.warp = &warp, thread.in = &block, thread.number = t;
      thread.copies.clear(), thread.committed = 0;
      thread.arrived = thread.has_waited = false;
      warp.live |= 1u << thread.lane;
      make_ready(thread);
      // What `emulator_switch` pops: six registers and where to return to, the stack aligned as after a call.
      void** stack = reinterpret_cast<void**>((uintptr_t(stacks) + (size_t(b) * threads + t + 1) * kStack) & -16) - 8;
      stack[6] = reinterpret_cast<void*>(&fiber), stack[7] = nullptr;
      thread.stack = stack;
    }
  }
  active = &cluster.blocks[0];
  poison_shared();
  current = nullptr;
  Thread* thread = choose();
  current = thread, view = thread;
  emulator_switch(&host, thread->stack);
  return failure;
}

void meet(unsigned mask, const char* what, Site site, void* slot, Act act) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1)) fail(std::string(what) + " by a lane that is not in its mask, " + name_of(site));
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (!meeting.waiting) {
    meeting.mask = mask, meeting.what = what, meeting.site = site, meeting.act = act;
  } else if (meeting.mask != mask || meeting.act != act || !same(meeting.site, site)) {
    fail(std::string("divergence: this lane is at ") + what + " (" + name_of(site) + "), others of its warp at " +
         meeting.what + " (" + name_of(meeting.site) + ")");
  }
  me.what = what, me.site = site;
  warp.slots[me.lane] = slot;
  meeting.waiting |= 1u << me.lane;
  if (!all_here(warp, meeting)) {
    rest(me, State::at_warp);
    reschedule();
  } else {
    complete(warp, meeting);
    if (chance(4)) reschedule();
  }
}

void sync_warp(unsigned mask, Site site) {
  meet(mask, "__syncwarp", site, nullptr, [](void* const*, unsigned) { current->warp->synced = ++now; });
}

void sync_block(Site site) {
  Thread& me = *current;
  Block& block = *me.in;
  if (block.waiting) {
    for (unsigned t = 0; t < launched.block.x; ++t) {
      const Thread& other = block.threads[t];
      if (other.state != State::at_block) continue;
      if (!same(other.site, site))
        fail("divergence: this thread is at __syncthreads (" + name_of(site) + "), thread " +
             std::to_string(other.number) + " at another (" + name_of(other.site) + ")");
      break;
    }
  }
  me.what = "__syncthreads", me.site = site;
  if (++block.waiting == block.live) {
    rest(me, State::at_block);
    complete_block(block);
    if (order == Order::shuffled) reschedule();
  } else {
    rest(me, State::at_block);
    reschedule();
  }
}

void arrive_at_cluster(bool relaxed, Site site) {
  Thread& me = *current;
  if (me.arrived) fail("arrives twice at the cluster's barrier, " + name_of(site));
  me.arrived = true, me.phase = cluster.phase;
  cluster.relaxed |= relaxed;
  if (++cluster.arrived == cluster.live) complete_cluster();
}

void wait_for_cluster(Site site) {
  Thread& me = *current;
  if (!me.arrived) fail("waits at the cluster's barrier without having arrived, " + name_of(site));
  me.what = "the cluster's barrier", me.site = site;
  while (me.phase == cluster.phase) {
    rest(me, State::at_cluster);
    reschedule();
  }
  me.arrived = false;
}

void wait_for_previous() { current->has_waited = true; }

void rely_on_previous_wait() {
  if (hasty) fail("relies on the wait of the kernel before, which let this one start before it had waited");
  current->has_waited = true;
}

void launch_next() {
  if (launched.early && !current->has_waited) hastes = true;
}

}  // namespace emulator

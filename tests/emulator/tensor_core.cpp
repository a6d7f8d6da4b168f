// mma.sync.m16n8k16 with the fragments of the PTX manual.
#include "ptx_emulated.h"

namespace emulator {

// Lane 4 g + t holds, by register and by half of it: of a, rows g and g + 8, columns 2 t, 2 t + 1 and those plus 8; of b,
// the same places along its 16 rows, in column g; of c, rows g and g + 8, columns 2 t and 2 t + 1.
void multiply(void* const* slots, unsigned lanes) {
  if (lanes != ~0u) fail("mma without some lanes of the warp");
  float a[16][16], b[16][8], c[16][8];
  const auto half = [](uint32_t pair, int which) { return __uint_as_float(which ? pair & 0xffff0000u : pair << 16); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half(mine.a[r], i);
      for (int r = 0; r < 2; ++r) {
        b[2 * t + i + r * 8][g] = half(mine.b[r], i);
        c[g + r * 8][2 * t + i] = mine.c[2 * r + i];
      }
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(slots[lane]);
    for (int i = 0; i < 4; ++i) mine.c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace emulator

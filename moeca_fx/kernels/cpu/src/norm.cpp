#include "norm.h"

#include <omp.h>

#include <cmath>
#include <vector>

#include "scalar.h"
#include "scratch.h"
#include "vec.h"

namespace moeca {
namespace {

enum Slot { kPanel, kStream, kOther, kGate, kFactor, kShift };

template <typename T>
const float* row_of(const void* data, int64_t offset, int64_t width, float* room) {
  const T* row = static_cast<const T*>(data) + offset;
  if constexpr (sizeof(T) == sizeof(float)) return row;
  load_row(room, row, width);
  return room;
}

template <typename T>
const float* modulation_of(const Modulation& m, int64_t sample, int64_t token, int64_t width, float* room) {
  return row_of<T>(m.data, sample * m.sample_stride + token * m.token_stride, width, room);
}

template <typename T>
void one_row(const AdaNorm& a, int64_t sample, int64_t token, Scratch& scratch) {
  const int64_t width = a.width, place = (sample * a.tokens + token) * width;
  float* room = scratch.take(kStream, width);
  const float* stream = row_of<T>(a.x, place, width, room);
  if (a.y != nullptr) {
    const float* y = row_of<T>(a.y, place, width, scratch.take(kOther, width));
    const float* gate = modulation_of<T>(a.gate, sample, token, width, scratch.take(kGate, width));
    for (int64_t i = 0; i < width; ++i) room[i] = stream[i] + gate[i] * y[i];
    store_row(static_cast<T*>(a.stream) + place, room, width);
    stream = room;
  }
  float mean = 0.0f, spread = 0.0f;
  int64_t i = 0;
  Vector lanes(0.0f);
  for (; i + Vector::size() <= width; i += Vector::size()) lanes = lanes + Vector::loadu(stream + i);
  mean = total(lanes);
  for (; i < width; ++i) mean += stream[i];
  mean /= static_cast<float>(width);
  const Vector centre(mean);
  lanes = Vector(0.0f);
  for (i = 0; i + Vector::size() <= width; i += Vector::size()) {
    const Vector off = Vector::loadu(stream + i) - centre;
    lanes = at::vec::fmadd(off, off, lanes);
  }
  spread = total(lanes);
  for (; i < width; ++i) spread += (stream[i] - mean) * (stream[i] - mean);
  const float scale = 1.0f / std::sqrt(spread / static_cast<float>(width) + static_cast<float>(a.eps));
  const float* factor = modulation_of<T>(a.factor, sample, token, width, scratch.take(kFactor, width));
  const float* shift = modulation_of<T>(a.shift, sample, token, width, scratch.take(kShift, width));
  T* out = static_cast<T*>(a.out) + place;
  float* result = scratch.take(kOther, width);
  if constexpr (sizeof(T) == sizeof(float)) result = reinterpret_cast<float*>(out);
  for (i = 0; i < width; ++i) result[i] = (stream[i] - mean) * scale * factor[i] + shift[i];
  if constexpr (sizeof(T) != sizeof(float)) store_row(out, result, width);
}

template <typename T>
void all_rows(const AdaNorm& a, int threads) {
  const int64_t rows = a.samples * a.tokens;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * a.width > 32768)
  for (int64_t r = 0; r < rows; ++r) one_row<T>(a, r / a.tokens, r % a.tokens, scratch_of_thread());
}

}  // namespace

void ada_norm(const AdaNorm& a, int threads) {
  if (a.bfloat16)
    all_rows<uint16_t>(a, threads);
  else
    all_rows<float>(a, threads);
}

}  // namespace moeca

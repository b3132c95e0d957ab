#include "norm.h"

#include <omp.h>

#include <cmath>

#include "scalar.h"
#include "scratch.h"
#include "vec.h"

namespace moeca {
namespace {

enum Slot { kWidened, kStream, kResult, kGate, kFactor, kShift };

constexpr int64_t kStep = Vector::size();

// What a thread keeps rows in: fp32 ones that must be widened, and a stream and a result that are narrowed.
struct Room {
  float *stream, *result, *gate, *factor, *shift;

  explicit Room(int64_t width) {
    Scratch& scratch = scratch_of_thread();
    auto take = [&](Slot slot) { return scratch.take(slot, width); };
    stream = take(kStream), result = take(kResult), gate = take(kGate), factor = take(kFactor), shift = take(kShift);
  }
};

const float* row_of(const float* data, int64_t offset, int64_t, float*) { return data + offset; }

const float* row_of(const uint16_t* data, int64_t offset, int64_t width, float* room) {
  load_row(room, data + offset, width);
  return room;
}

template <typename T>
const float* modulation_of(const Modulation& m, int64_t sample, int64_t token, int64_t width, float* room) {
  return row_of(static_cast<const T*>(m.data), sample * m.sample_stride + token * m.token_stride, width, room);
}

// each(i, n) for every vector of a row: n values from i on, kStep but for the last.
template <typename Each>
void for_vectors(int64_t width, const Each& each) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) each(i, kStep);
  if (i < width) each(i, width - i);
}

Vector some_of(const float* row, int64_t n) { return Vector::loadu(row, n); }

Vector some_of(const uint16_t* row, int64_t n) {
  return vector_of(n == kStep ? load(row) : load_some(row, n));
}

// to = x + gate * y
template <typename Y>
void add_gated(const float* x, const float* gate, const Y* y, int64_t width, float* to) {
  for_vectors(width, [&](int64_t i, int64_t n) {
    const Vector sum = at::vec::fmadd(Vector::loadu(gate + i, n), some_of(y + i, n), Vector::loadu(x + i, n));
    sum.store(to + i, static_cast<int>(n));
  });
}

// to = (row - mean) / sqrt(variance + eps) * factor + shift
void normalize(const float* row, const float* factor, const float* shift, double eps, int64_t width, float* to) {
  Vector sum(0.0f), squares(0.0f);
  for_vectors(width, [&](int64_t i, int64_t n) { sum = sum + Vector::loadu(row + i, n); });
  const float mean = total(sum) / static_cast<float>(width);
  const Vector centre(mean), zero(0.0f);
  for_vectors(width, [&](int64_t i, int64_t n) {
    const Vector off = Vector::set(zero, Vector::loadu(row + i, n) - centre, n);
    squares = at::vec::fmadd(off, off, squares);
  });
  const Vector scale(1.0f / std::sqrt(total(squares) / static_cast<float>(width) + static_cast<float>(eps)));
  for_vectors(width, [&](int64_t i, int64_t n) {
    const Vector value = (Vector::loadu(row + i, n) - centre) * scale;
    at::vec::fmadd(value, Vector::loadu(factor + i, n), Vector::loadu(shift + i, n)).store(to + i, static_cast<int>(n));
  });
}

template <typename T, typename Y>
void one_row(const AdaNorm& a, int64_t sample, int64_t token, const Room& room) {
  constexpr bool wide = sizeof(T) == sizeof(float);  // rows are read and written where they lie
  const int64_t width = a.width, place = (sample * a.tokens + token) * width;
  const float* row = row_of(static_cast<const T*>(a.x), place, width, room.stream);
  if (a.y != nullptr) {
    const Y* y = static_cast<const Y*>(a.y) + place;
    T* stream = static_cast<T*>(a.stream) + place;
    float* sum = room.stream;
    if constexpr (wide) sum = stream;
    add_gated(row, modulation_of<T>(a.gate, sample, token, width, room.gate), y, width, sum);
    if constexpr (!wide) store_row(stream, sum, width);
    row = sum;
  }
  T* out = static_cast<T*>(a.out) + place;
  float* result = room.result;
  if constexpr (wide) result = out;
  normalize(row, modulation_of<T>(a.factor, sample, token, width, room.factor),
            modulation_of<T>(a.shift, sample, token, width, room.shift), a.eps, width, result);
  if constexpr (!wide) store_row(out, result, width);
}

template <typename T, typename Y>
void all_rows(const AdaNorm& a, int threads) {
  const int64_t rows = a.samples * a.tokens;
#pragma omp parallel num_threads(threads) if (rows * a.width > 32768)
  {
    const Room room(a.width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) one_row<T, Y>(a, r / a.tokens, r % a.tokens, room);
  }
}

}  // namespace

void ada_norm(const AdaNorm& a, int threads) {
  if (a.bfloat16)
    all_rows<uint16_t, uint16_t>(a, threads);
  else if (a.y_bfloat16)
    all_rows<float, uint16_t>(a, threads);
  else
    all_rows<float, float>(a, threads);
}

}  // namespace moeca

// Linears: activations into panels, weight tiles times panels. Included by kernels.h inside an instruction set's namespace.
//
// Each output is one chain of sums in the order of the inputs, group by group; neither the number of rows nor their
// place in a panel changes it. That is why a row's bits don't depend on the batch.

// Vectors of a tile held at once, so that accumulators and weights fit the registers.
constexpr int vectors_at_once(int rows, bool quantized) {
  const int accumulators = quantized ? 2 : 1;
  const int weights = quantized ? 2 : 1;
  int vectors = 4;
  while (vectors > 1 && (accumulators * rows + weights) * vectors > kRegisters - 2) vectors /= 2;
  return vectors;
}

inline float inverse_rms(const float* x, int64_t n, float epsilon) {
  Floats squares = splat(0.0F);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load(x + i);
    squares = multiply_add(v, v, squares);
  }
  return 1.0F / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(n) + epsilon);
}

struct NormalizedRow {
  const float* x;
  const float* norm;  // or null
  Floats factor;

  Floats at(int64_t i) const {
    const Floats v = load(x + i);
    return norm == nullptr ? v : multiply(multiply(v, factor), load(norm + i));
  }
};

// Below this a group counts as zero: the inverse of its scale would overflow.
constexpr float kTiny = 1e-30F;

void quantize_row(const NormalizedRow& row, int64_t groups, int64_t panel_rows, int32_t offset, int8_t* values,
                  float* scales, int32_t* initial, float* sums) {
  constexpr int kVectors = kGroup / kLanes;
  for (int64_t g = 0; g < groups; g++) {
    Floats v[kVectors];
    Floats top = splat(0.0F);
    for (int i = 0; i < kVectors; i++) {
      v[i] = row.at(g * kGroup + i * kLanes);
      top = maximum(absolute(v[i]), top);
    }
    const float greatest = reduce_max(top);
    const Floats inverse = splat(greatest < kTiny ? 0.0F : 127.0F / greatest);
    Ints sum = splat_int(0);
    for (int i = 0; i < kVectors; i++) {
      const Ints q = round_to_int(multiply(v[i], inverse));
      sum = add(sum, q);
      store_bytes(values + g * panel_rows * kGroup + i * kLanes, q);
    }
    const float scale = greatest / 127.0F;
    const int32_t total = reduce_add(sum);
    scales[g * panel_rows] = scale;
    initial[g * panel_rows] = -offset * total;
    if (sums != nullptr) sums[g * panel_rows] = scale * static_cast<float>(total);
  }
}

void fill_panel(const Panels& panels, int64_t panel, const float* x, const float* norm, float epsilon) {
  const int64_t first = panels.first_row(panel);
  const int64_t count = panels.first_row(panel + 1) - first;
  const int64_t inputs = panels.inputs;
  const int64_t groups = inputs / kGroup;
  const int32_t offset = panels.format == MK_Q8 ? kByteOffset : panels.format == MK_Q4 ? 8 : 0;
  for (int64_t r = 0; r < count; r++) {
    const float* values = x + (first + r) * inputs;
    const float factor = norm == nullptr ? 1.0F : inverse_rms(values, inputs, epsilon);
    const NormalizedRow row = {values, norm, splat(factor)};
    if (is_quantized(panels.format)) {
      const int64_t at = first * groups + r;
      quantize_row(row, groups, count, offset, static_cast<int8_t*>(panels.values) + first * inputs + r * kGroup,
                   panels.scales + at, panels.initial + at,
                   panels.format == MK_Q4_MIN ? panels.sums + at : nullptr);
      continue;
    }
    float chunk[kGroup];
    for (int64_t g = 0; g < inputs; g += kGroup) {
      for (int i = 0; i < kGroup; i += kLanes) store(chunk + i, row.at(g + i));
      if (panels.format == MK_BF16) {
        uint16_t* out = static_cast<uint16_t*>(panels.values) + first * inputs + g * count + 2 * r;
        for (int i = 0; i < kGroup; i++) out[(i / 2) * 2 * count + i % 2] = to_bfloat(chunk[i]);
      } else {
        float* out = static_cast<float*>(panels.values) + first * inputs + g * count + r;
        for (int i = 0; i < kGroup; i++) out[i * count] = chunk[i];
      }
    }
  }
}

struct PanelView {
  const int8_t* values;
  const float* scales;
  const int32_t* initial;
  const float* sums;
};

// The next tile is fetched while this one is multiplied, a share of it with each pass over this one: then memory and
// arithmetic keep each other's time instead of taking turns.
struct Ahead {
  const uint8_t* at;
  int64_t lines;  // cache lines that one panel fetches
};

class Fetcher {
 public:
  // For the pass over `width` of the tile's outputs that begins with `first`.
  Fetcher(const Ahead& ahead, int first, int width, int64_t steps)
      : at_(ahead.at + ahead.lines * first / kTile * 64),
        left_(ahead.lines * (first + width) / kTile - ahead.lines * first / kTile),
        step_lines_(divide_up(left_, steps)) {}
  void step() {
    const int64_t lines = least(step_lines_, left_);
    for (int64_t i = 0; i < lines; i++) prefetch(at_ + i * 64);
    at_ += lines * 64;
    left_ -= lines;
  }

 private:
  const uint8_t* at_;
  int64_t left_;
  int64_t step_lines_;
};

// One panel times one tile of quantized weights: out [R][64].
template <int R, int32_t Format>
MK_KERNEL void multiply_quantized(const uint8_t* weights, const uint16_t* scales, const uint16_t* mins, const PanelView& x,
                        int64_t groups, const Ahead& ahead, float* out) {
  constexpr int V = vectors_at_once(R, true);
  constexpr int kSteps = Format == MK_Q8 ? 8 : 4;  // vectors of weights per lane and group
  constexpr int64_t kSubtileBytes = kSteps * 4 * kSubtile;
  constexpr int64_t kGroupBytes = kSubtileBytes * kTile / kSubtile;
  for (int first = 0; first < kTile; first += V * kLanes) {
    const uint8_t* w = weights + first / kSubtile * kSubtileBytes + first % kSubtile * 4;
    Floats sum[R][V];
    MK_UNROLL for (int r = 0; r < R; r++) MK_UNROLL for (int v = 0; v < V; v++) sum[r][v] = splat(0.0F);
    Fetcher fetcher(ahead, first, V * kLanes, groups);
    for (int64_t g = 0; g < groups; g++, w += kGroupBytes) {
      fetcher.step();
      Ints dot[R][V];
      MK_UNROLL for (int r = 0; r < R; r++) {
        const Ints initial = splat_int(x.initial[g * R + r]);
        MK_UNROLL for (int v = 0; v < V; v++) dot[r][v] = initial;
      }
      const int8_t* values = x.values + g * R * kGroup;
      MK_UNROLL for (int step = 0; step < kSteps; step++) {
        Ints low[V];
        Ints high[V];
        MK_UNROLL for (int v = 0; v < V; v++) {
          constexpr int kPerSubtile = kSubtile / kLanes;
          const uint8_t* at = w + v / kPerSubtile * kSubtileBytes + v % kPerSubtile * kLanes * 4 + step * 4 * kSubtile;
          low[v] = load_words(at);
          if (Format != MK_Q8) {
            high[v] = high_nibbles(low[v]);
            low[v] = low_nibbles(low[v]);
          }
        }
        MK_UNROLL for (int r = 0; r < R; r++) {
          const int8_t* bytes = values + r * kGroup + step * (kGroup / kSteps);
          const Ints x_low = splat_word(bytes);
          MK_UNROLL for (int v = 0; v < V; v++) {
            dot[r][v] = Format == MK_Q8 ? dot_bytes(dot[r][v], low[v], x_low) : dot_nibbles(dot[r][v], low[v], x_low);
          }
          if (Format != MK_Q8) {
            const Ints x_high = splat_word(bytes + 4);
            MK_UNROLL for (int v = 0; v < V; v++) dot[r][v] = dot_nibbles(dot[r][v], high[v], x_high);
          }
        }
      }
      MK_UNROLL for (int v = 0; v < V; v++) {
        const Floats scale = load_float16(scales + g * kTile + first + v * kLanes);
        MK_UNROLL for (int r = 0; r < R; r++) {
          sum[r][v] = multiply_add(to_float(dot[r][v]), multiply(scale, splat(x.scales[g * R + r])), sum[r][v]);
        }
        if (Format == MK_Q4_MIN) {
          const Floats min = load_float16(mins + g * kTile + first + v * kLanes);
          MK_UNROLL for (int r = 0; r < R; r++) sum[r][v] = multiply_add(min, splat(x.sums[g * R + r]), sum[r][v]);
        }
      }
    }
    MK_UNROLL for (int r = 0; r < R; r++) {
      MK_UNROLL for (int v = 0; v < V; v++) store(out + r * kTile + first + v * kLanes, sum[r][v]);
    }
  }
}

// The same for bfloat16 (two inputs a step) and float weights.
template <int R, bool Pairs>
MK_KERNEL void multiply_plain(const uint8_t* weights, const void* x, int64_t inputs, const Ahead& ahead, float* out) {
  constexpr int V = vectors_at_once(R, false);
  const int64_t steps = Pairs ? inputs / 2 : inputs;
  for (int first = 0; first < kTile; first += V * kLanes) {
    const uint8_t* w = weights + first * 4;
    const uint8_t* values = static_cast<const uint8_t*>(x);
    Floats sum[R][V];
    MK_UNROLL for (int r = 0; r < R; r++) MK_UNROLL for (int v = 0; v < V; v++) sum[r][v] = splat(0.0F);
    Fetcher fetcher(ahead, first, V * kLanes, steps);
    for (int64_t step = 0; step < steps; step++, w += 4 * kTile, values += 4 * R) {
      fetcher.step();
      MK_UNROLL for (int v = 0; v < V; v++) {
        const uint8_t* at = w + v * kLanes * 4;
        if (Pairs) {
          const Ints pair = load_words(at);
          MK_UNROLL for (int r = 0; r < R; r++) sum[r][v] = dot_bfloats(sum[r][v], pair, splat_word(values + 4 * r));
        } else {
          const Floats one = load(reinterpret_cast<const float*>(at));
          MK_UNROLL for (int r = 0; r < R; r++) {
            sum[r][v] = multiply_add(one, splat(reinterpret_cast<const float*>(values)[r]), sum[r][v]);
          }
        }
      }
    }
    MK_UNROLL for (int r = 0; r < R; r++) {
      MK_UNROLL for (int v = 0; v < V; v++) store(out + r * kTile + first + v * kLanes, sum[r][v]);
    }
  }
}

template <int R>
void multiply_panel(const mk_weight& weight, const Panels& panels, int64_t tile, int64_t first_row,
                    const Ahead& ahead, float* out) {
  const uint8_t* w = static_cast<const uint8_t*>(weight.values) + tile * tile_bytes(weight.format, weight.inputs);
  const int64_t groups = weight.inputs / kGroup;
  const uint16_t* scales = advance(weight.scales, tile * groups * kTile);
  const uint16_t* mins = advance(weight.mins, tile * groups * kTile);
  const int64_t at = first_row * groups;
  const PanelView x = {static_cast<const int8_t*>(panels.values) + first_row * weight.inputs, advance(panels.scales, at),
                       advance(panels.initial, at), advance(panels.sums, at)};
  const int64_t element = first_row * weight.inputs;
  switch (weight.format) {
    case MK_F32:
      multiply_plain<R, false>(w, static_cast<const float*>(panels.values) + element, weight.inputs, ahead, out);
      break;
    case MK_BF16:
      multiply_plain<R, true>(w, static_cast<const uint16_t*>(panels.values) + element, weight.inputs, ahead, out);
      break;
    case MK_Q8: multiply_quantized<R, MK_Q8>(w, scales, mins, x, groups, ahead, out); break;
    case MK_Q4: multiply_quantized<R, MK_Q4>(w, scales, mins, x, groups, ahead, out); break;
    case MK_Q4_MIN: multiply_quantized<R, MK_Q4_MIN>(w, scales, mins, x, groups, ahead, out); break;
    default: break;
  }
}

void multiply_rows(const mk_weight& weight, const Panels& panels, int64_t tile, int64_t first_row, int64_t rows,
                   const Ahead& ahead, float* out) {
  switch (rows) {
    case 1: multiply_panel<1>(weight, panels, tile, first_row, ahead, out); break;
    case 2: multiply_panel<2>(weight, panels, tile, first_row, ahead, out); break;
#define MK_ROWS(n) \
  case n: \
    if constexpr (kPanelRows >= n) multiply_panel<n>(weight, panels, tile, first_row, ahead, out); \
    break
    MK_ROWS(3);
    MK_ROWS(4);
    MK_ROWS(5);
    MK_ROWS(6);
#undef MK_ROWS
    default: break;
  }
}

// What a tile's products of one row become.
void finish_row(const mk_weight& weight, int64_t tile, int32_t epilogue, float* products, float* y_row) {
  const int columns = static_cast<int>(least(kTile, weight.outputs - tile * kTile));
  if (weight.bias != nullptr) {
    for (int i = 0; i < columns; i++) products[i] += weight.bias[tile * kTile + i];
  }
  if (epilogue == MK_SILU_MUL) {
    float* y = y_row + tile * kTile / 2;
    for (int pair = 0; pair < columns; pair += 2 * kSubtile) {
      for (int i = 0; i < kSubtile; i += kLanes) {
        store(y + pair / 2 + i, multiply(silu(load(products + pair + i)), load(products + pair + kSubtile + i)));
      }
    }
    return;
  }
  float* y = y_row + tile * kTile;
  if (epilogue == MK_ADD) {
    for (int i = 0; i < columns; i++) y[i] += products[i];
  } else {
    for (int i = 0; i < columns; i++) y[i] = products[i];
  }
}

void linear_tile(const mk_weight& weight, const Panels& panels, int64_t tile, int64_t first_panel, int64_t last_panel,
                 int32_t epilogue, float* y) {
  const int64_t columns = epilogue == MK_SILU_MUL ? weight.outputs / 2 : weight.outputs;
  alignas(64) float products[kPanelRows * kTile];
  const int64_t bytes = tile_bytes(weight.format, weight.inputs);
  const int64_t lines = (tile + 1) * kTile < weight.outputs ? bytes / 64 / (last_panel - first_panel) : 0;
  const uint8_t* next_tile = static_cast<const uint8_t*>(weight.values) + (tile + 1) * bytes;
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const int64_t first = panels.first_row(panel);
    const int64_t rows = panels.first_row(panel + 1) - first;
    multiply_rows(weight, panels, tile, first, rows, {next_tile + (panel - first_panel) * lines * 64, lines}, products);
    for (int64_t r = 0; r < rows; r++) {
      finish_row(weight, tile, epilogue, products + r * kTile, y + (first + r) * columns);
    }
  }
}

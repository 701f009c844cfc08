// Attention over a paged cache. Included by kernels.h inside an instruction set's namespace.
//
// The cache keeps keys and values in the order in which the dot products want them, per KV head and 16 tokens:
//   keys    bfloat16 [head_dim / 2][16 tokens][2]   values  bfloat16 [16 tokens / 2][head_dim][2]
//   keys    float    [head_dim][16 tokens]          values  float    [16 tokens][head_dim]
//   keys and values of signed bytes lie as the bfloat16 do, with float [16 tokens] of scales behind them
// so that neither decoding nor prefill transposes or reduces across lanes. A decode step and a prefill chunk run the same
// code over the same tiles of 4 x 16 positions, counted from the sequence's start: a row's bits depend neither on the
// batch nor on how its prompt was cut into chunks.
//
// Bytes are widened to bfloat16, which holds them exactly, once per tile and task; their scales go onto the scores and
// onto the probabilities, so that nothing is rounded more than once.

constexpr int kStep = 4;  // cache tiles between two rescalings of a row
constexpr int kStepTokens = kStep * kCacheTile;
constexpr float kSlack = 8.0F;  // by how much, as a power of two, scores may exceed what they are relative to

template <bool Wide>
struct CacheTraits;
template <>
struct CacheTraits<false> {
  using Element = uint16_t;
  static constexpr int kPerWord = 2;
  static Floats dot(Floats sum, const void* cache, const void* x) {
    return dot_bfloats(sum, load_words(cache), splat_word(x));
  }
  static void narrow(Element* out, Floats v) { store_bfloats(out, v); }
};
template <>
struct CacheTraits<true> {
  using Element = float;
  static constexpr int kPerWord = 1;
  static Floats dot(Floats sum, const void* cache, const void* x) {
    return multiply_add(load(static_cast<const float*>(cache)), splat(*static_cast<const float*>(x)), sum);
  }
  static void narrow(Element* out, Floats v) { store(out, v); }
};

struct TileSpan {
  int64_t position;  // of the first token
  int64_t tokens;
  const float* key_scales;  // [16 tokens], null where values have no scales
  const float* value_scales;
};

template <bool Wide>
struct AttentionState {
  using Element = typename CacheTraits<Wide>::Element;
  alignas(64) Element queries[kAttentionRows * kMaxHeadDim];
  alignas(64) float sums[kAttentionRows * kMaxHeadDim];
  alignas(64) float weights[kAttentionRows * kCacheTile];  // a row's sum of exponentials, by lane
  alignas(64) float scores[kPanelRows * kStepTokens];
  alignas(64) Element probabilities[kPanelRows * kStepTokens];
  float reference[kAttentionRows];  // the score that a row's probabilities are relative to
};

// scores [R][64] of R query rows against T tiles.
template <bool Wide, int R, int T>
void score_tiles(const typename CacheTraits<Wide>::Element* queries, const uint8_t* const* tiles, int32_t head_dim,
                 float* scores) {
  constexpr int kVectors = kCacheTile / kLanes;
  Floats sum[R][T * kVectors];
  MK_UNROLL for (int r = 0; r < R; r++) MK_UNROLL for (int v = 0; v < T * kVectors; v++) sum[r][v] = splat(0.0F);
  for (int32_t step = 0; step < head_dim / CacheTraits<Wide>::kPerWord; step++) {
    MK_UNROLL for (int v = 0; v < T * kVectors; v++) {
      const uint8_t* at = tiles[v / kVectors] + (step * kCacheTile + v % kVectors * kLanes) * 4;
      MK_UNROLL for (int r = 0; r < R; r++) {
        sum[r][v] = CacheTraits<Wide>::dot(sum[r][v], at, queries + r * head_dim + step * CacheTraits<Wide>::kPerWord);
      }
    }
  }
  MK_UNROLL for (int r = 0; r < R; r++) {
    MK_UNROLL for (int v = 0; v < T * kVectors; v++) store(scores + r * kStepTokens + v * kLanes, sum[r][v]);
  }
}

// Adds R rows' probabilities times the values of some tiles to V vectors of sums [R][head_dim].
template <bool Wide, int R, int V>
void add_values(const typename CacheTraits<Wide>::Element* probabilities, const uint8_t* const* tiles,
                const int* tokens, int tile_count, int32_t head_dim, int32_t first, float* sums) {
  constexpr int kPerWord = CacheTraits<Wide>::kPerWord;
  Floats sum[R][V];
  MK_UNROLL for (int r = 0; r < R; r++) {
    MK_UNROLL for (int v = 0; v < V; v++) sum[r][v] = load(sums + r * head_dim + first + v * kLanes);
  }
  for (int t = 0; t < tile_count; t++) {
    for (int step = 0; step < (tokens[t] + kPerWord - 1) / kPerWord; step++) {
      MK_UNROLL for (int v = 0; v < V; v++) {
        const uint8_t* at = tiles[t] + (static_cast<int64_t>(step) * head_dim + first + v * kLanes) * 4;
        MK_UNROLL for (int r = 0; r < R; r++) {
          sum[r][v] = CacheTraits<Wide>::dot(sum[r][v], at,
                                             probabilities + r * kStepTokens + t * kCacheTile + step * kPerWord);
        }
      }
    }
  }
  MK_UNROLL for (int r = 0; r < R; r++) {
    MK_UNROLL for (int v = 0; v < V; v++) store(sums + r * head_dim + first + v * kLanes, sum[r][v]);
  }
}

// Hides the scores that a row doesn't see, and gives those of bytes their scales.
inline void finish_scores(float* scores, int64_t visible, const TileSpan* spans, int tile_count) {
  for (int t = 0; t < tile_count; t++) {
    const int64_t seen = least(visible - spans[t].position, spans[t].tokens);
    if (seen == kCacheTile && spans[t].key_scales == nullptr) continue;
    for (int i = 0; i < kCacheTile; i += kLanes) {
      float* at = scores + t * kCacheTile + i;
      const Floats v = spans[t].key_scales == nullptr ? load(at) : multiply(load(at), load(spans[t].key_scales + i));
      store(at, first_lanes(v, seen <= i ? 0 : static_cast<int>(least(seen - i, kLanes)), splat(-__builtin_inff())));
    }
  }
}

// What a row has gathered, relative to the greatest of these scores instead of the one before.
template <bool Wide>
void rescale(AttentionState<Wide>& state, int64_t row, Floats top, int32_t head_dim) {
  const float before = state.reference[row];
  state.reference[row] = reduce_max(top);
  const Floats factor = two_to_the(splat(before - state.reference[row]));
  float* weights = state.weights + row * kCacheTile;
  for (int i = 0; i < kCacheTile; i += kLanes) store(weights + i, multiply(load(weights + i), factor));
  float* sums = state.sums + row * head_dim;
  for (int32_t i = 0; i < head_dim; i += kLanes) store(sums + i, multiply(load(sums + i), factor));
}

// Scores, which are binary logarithms, into probabilities. They are relative to a score that none of the row so far
// exceeds by more than kSlack; seldom is that a new one.
template <bool Wide>
void soften(AttentionState<Wide>& state, int64_t row, int r, int64_t visible, const TileSpan* spans, int tile_count,
            int32_t head_dim) {
  float* scores = state.scores + r * kStepTokens;
  finish_scores(scores, visible, spans, tile_count);
  Floats top = load(scores);
  for (int i = kLanes; i < tile_count * kCacheTile; i += kLanes) top = maximum(top, load(scores + i));
  if (any_greater(top, splat(state.reference[row] + kSlack))) rescale<Wide>(state, row, top, head_dim);
  float* weights = state.weights + row * kCacheTile;
  const Floats reference = splat(state.reference[row]);
  auto* probabilities = state.probabilities + r * kStepTokens;
  for (int i = 0; i < kCacheTile; i += kLanes) {
    Floats total = load(weights + i);
    for (int t = 0; t < tile_count; t++) {
      const Floats p = two_to_the(subtract(load(scores + t * kCacheTile + i), reference));
      const float* value_scales = spans[t].value_scales;
      CacheTraits<Wide>::narrow(probabilities + t * kCacheTile + i,
                                value_scales == nullptr ? p : multiply(p, load(value_scales + i)));
      total = add(total, p);
    }
    store(weights + i, total);
  }
}

struct StepTiles {
  const uint8_t* keys[kStep];
  const uint8_t* values[kStep];
  TileSpan spans[kStep];
  int count;
};

template <bool Wide, int R>
void attend_rows(AttentionState<Wide>& state, int64_t row, const int64_t* visible, const StepTiles& tiles,
                 int32_t head_dim) {
  const auto* queries = state.queries + row * head_dim;
  int done = 0;
  if constexpr (kAttentionTiles * R * (kCacheTile / kLanes) <= kRegisters - 6) {
    for (; done + kAttentionTiles <= tiles.count; done += kAttentionTiles) {
      score_tiles<Wide, R, kAttentionTiles>(queries, tiles.keys + done, head_dim, state.scores + done * kCacheTile);
    }
  }
  for (; done < tiles.count; done++) {
    score_tiles<Wide, R, 1>(queries, tiles.keys + done, head_dim, state.scores + done * kCacheTile);
  }
  int tokens[kStep];
  for (int t = 0; t < tiles.count; t++) {
    const int64_t seen = least(visible[R - 1] - tiles.spans[t].position, tiles.spans[t].tokens);
    tokens[t] = seen < 0 ? 0 : static_cast<int>(seen);
  }
  for (int r = 0; r < R; r++) soften<Wide>(state, row + r, r, visible[r], tiles.spans, tiles.count, head_dim);
  float* sums = state.sums + row * head_dim;
  constexpr int V = vectors_at_once(R, false);
  int32_t first = 0;
  for (; first + V * kLanes <= head_dim; first += V * kLanes) {
    add_values<Wide, R, V>(state.probabilities, tiles.values, tokens, tiles.count, head_dim, first, sums);
  }
  for (; first < head_dim; first += kLanes) {
    add_values<Wide, R, 1>(state.probabilities, tiles.values, tokens, tiles.count, head_dim, first, sums);
  }
}

inline void fetch_tiles(const uint8_t* const* tiles, int count, int64_t bytes) {
  for (int t = 0; t < count; t++) {
    for (int64_t at = 0; at < bytes; at += 64) prefetch(tiles[t] + at);
  }
}

template <bool Wide>
void attend_step(AttentionState<Wide>& state, int64_t rows, const int64_t* visible, const StepTiles& tiles,
                 const mk_shape& shape) {
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    const int64_t count = least(kPanelRows, rows - row);
    if (visible[row + count - 1] <= tiles.spans[0].position) continue;
    const int64_t* seen = visible + row;
    switch (count) {
#define MK_ROWS(n) \
  case n: \
    if constexpr (kPanelRows >= n) attend_rows<Wide, n>(state, row, seen, tiles, shape.head_dim); \
    break
      MK_ROWS(1);
      MK_ROWS(2);
      MK_ROWS(3);
      MK_ROWS(4);
      MK_ROWS(5);
      MK_ROWS(6);
#undef MK_ROWS
      default: break;
    }
  }
}

StepTiles step_tiles(const AttentionTask& task, const CacheGeometry& cache, int64_t first_tile, int64_t end_position) {
  StepTiles tiles;
  tiles.count = 0;
  for (int64_t tile = first_tile; tile < first_tile + kStep; tile++) {
    const int64_t block = tile / cache.tiles_per_block;
    const int64_t within = tile % cache.tiles_per_block;
    const int64_t position = block * cache.block_tokens + within * kCacheTile;
    if (position >= end_position) break;
    const int64_t offset = cache.tile_offset(task.table[block], task.kv_head, within);
    const uint8_t* keys = tiles.keys[tiles.count] = static_cast<const uint8_t*>(task.keys) + offset;
    const uint8_t* values = tiles.values[tiles.count] = static_cast<const uint8_t*>(task.values) + offset;
    const bool scaled = cache.tile_bytes > cache.value_bytes;
    tiles.spans[tiles.count] = {position, least(kCacheTile, cache.block_tokens - within * kCacheTile),
                                scaled ? reinterpret_cast<const float*>(keys + cache.value_bytes) : nullptr,
                                scaled ? reinterpret_cast<const float*>(values + cache.value_bytes) : nullptr};
    tiles.count++;
  }
  return tiles;
}

// A step's tiles of bytes as bfloat16.
struct WidenedTiles {
  alignas(64) uint16_t keys[kStep][kCacheTile * kMaxHeadDim];
  alignas(64) uint16_t values[kStep][kCacheTile * kMaxHeadDim];

  StepTiles of(const StepTiles& tiles, int64_t elements) {
    StepTiles widened = tiles;
    for (int t = 0; t < tiles.count; t++) {
      widen(tiles.keys[t], elements, keys[t]);
      widen(tiles.values[t], elements, values[t]);
      widened.keys[t] = reinterpret_cast<const uint8_t*>(keys[t]);
      widened.values[t] = reinterpret_cast<const uint8_t*>(values[t]);
    }
    return widened;
  }

 private:
  static void widen(const uint8_t* bytes, int64_t count, uint16_t* out) {
    const int8_t* from = reinterpret_cast<const int8_t*>(bytes);
    for (int64_t i = 0; i < count; i++) {
      const float value = from[i];
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      out[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
};
struct NothingToWiden {
  StepTiles of(const StepTiles& tiles, int64_t) { return tiles; }
};

template <bool Wide, typename Widened>
void attend_cache(const AttentionTask& task) {
  const mk_shape& shape = *task.shape;
  const CacheGeometry cache(shape);
  const int32_t head_dim = shape.head_dim;
  const int32_t group = shape.heads / shape.kv_heads;
  const int64_t rows = (task.last_token - task.first_token) * group;
  const int64_t width = static_cast<int64_t>(shape.heads + 2 * shape.kv_heads) * head_dim;
  AttentionState<Wide> state;
  Widened widened;
  int64_t visible[kAttentionRows];
  const Floats scale = splat(shape.attention_scale * 1.44269504F);  // so that scores are binary logarithms
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = task.first_token + row / group;
    const float* query = task.qkv + (task.piece_row + token) * width + (task.kv_head * group + row % group) * head_dim;
    for (int32_t i = 0; i < head_dim; i += kLanes) {
      CacheTraits<Wide>::narrow(state.queries + row * head_dim + i, multiply(load(query + i), scale));
    }
    visible[row] = task.piece_start + token + 1;
    state.reference[row] = -__builtin_inff();
  }
  __builtin_memset(state.sums, 0, static_cast<size_t>(rows * head_dim) * sizeof(float));
  __builtin_memset(state.weights, 0, static_cast<size_t>(rows) * kCacheTile * sizeof(float));
  const int64_t end = visible[rows - 1];
  // Blocks lie anywhere in memory: while one step's keys and values are used, the next one's are fetched.
  StepTiles tiles = step_tiles(task, cache, 0, end);
  for (int64_t tile = kStep; tiles.count > 0; tile += kStep) {
    const StepTiles next = step_tiles(task, cache, tile, end);
    fetch_tiles(next.keys, next.count, cache.tile_bytes);
    fetch_tiles(next.values, next.count, cache.tile_bytes);
    attend_step<Wide>(state, rows, visible, widened.of(tiles, kCacheTile * head_dim), shape);
    tiles = next;
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = task.first_token + row / group;
    Floats total = splat(0.0F);
    for (int i = 0; i < kCacheTile; i += kLanes) total = add(total, load(state.weights + row * kCacheTile + i));
    const Floats inverse = splat(1.0F / reduce_add(total));
    float* out = task.out + ((task.piece_row + token) * shape.heads + task.kv_head * group + row % group) * head_dim;
    for (int32_t i = 0; i < head_dim; i += kLanes) {
      store(out + i, multiply(load(state.sums + row * head_dim + i), inverse));
    }
  }
}

void attend(const AttentionTask& task) {
  switch (task.shape->cache_format) {
    case MK_F32: attend_cache<true, NothingToWiden>(task); break;
    case MK_BF16: attend_cache<false, NothingToWiden>(task); break;
    default: attend_cache<false, WidenedTiles>(task); break;
  }
}

void rotate_head(const mk_shape& shape, const float* norm, int64_t position, float* head) {
  if (norm != nullptr) {
    const Floats factor = splat(inverse_rms(head, shape.head_dim, shape.norm_epsilon));
    for (int32_t i = 0; i < shape.head_dim; i += kLanes) {
      store(head + i, multiply(multiply(load(head + i), factor), load(norm + i)));
    }
  }
  const int32_t half = shape.rotary_dims / 2;
  const int32_t stride = shape.rotary_interleaved != 0 ? 2 : 1;
  const int32_t partner = shape.rotary_interleaved != 0 ? 1 : half;
  const float* cosines = shape.cosines + position * half;
  const float* sines = shape.sines + position * half;
  for (int32_t i = 0; i < half; i++) {
    const float a = head[i * stride];
    const float b = head[i * stride + partner];
    head[i * stride] = a * cosines[i] - b * sines[i];
    head[i * stride + partner] = b * cosines[i] + a * sines[i];
  }
}

// A head's key or value as cache elements. A plain cache has no scales; bytes get the one that makes the greatest 127.
template <typename Element>
void narrow_head(const float* head, int32_t head_dim, Element* out, float*) {
  for (int32_t i = 0; i < head_dim; i += kLanes) CacheTraits<sizeof(Element) == 4>::narrow(out + i, load(head + i));
}
void narrow_head(const float* head, int32_t head_dim, int8_t* out, float* scale) {
  Floats top = splat(0.0F);
  for (int32_t i = 0; i < head_dim; i += kLanes) top = maximum(absolute(load(head + i)), top);
  const float greatest = reduce_max(top);
  const Floats inverse = splat(greatest < kTiny ? 0.0F : 127.0F / greatest);
  for (int32_t i = 0; i < head_dim; i += kLanes) store_bytes(out + i, round_to_int(multiply(load(head + i), inverse)));
  *scale = greatest / 127.0F;
}

// Writes one token into its lane of a tile of keys and one of values. kPerWord elements of a key, or of consecutive
// tokens' values, make a word.
template <typename Element>
void write_head(const CacheGeometry& cache, int32_t head_dim, int64_t lane, bool clear_next, const float* key,
                const float* value, uint8_t* key_tile, uint8_t* value_tile) {
  constexpr int kPerWord = sizeof(Element) == 4 ? 1 : 2;
  Element* keys = reinterpret_cast<Element*>(key_tile);
  Element* values = reinterpret_cast<Element*>(value_tile);
  float* key_scales = reinterpret_cast<float*>(key_tile + cache.value_bytes);
  float* value_scales = reinterpret_cast<float*>(value_tile + cache.value_bytes);
  alignas(64) Element narrow_key[kMaxHeadDim];
  alignas(64) Element narrow_value[kMaxHeadDim];
  narrow_head(key, head_dim, narrow_key, key_scales + lane);
  narrow_head(value, head_dim, narrow_value, value_scales + lane);
  for (int32_t i = 0; i < head_dim; i++) {
    keys[(i / kPerWord * kCacheTile + lane) * kPerWord + i % kPerWord] = narrow_key[i];
    const int64_t at = (lane / kPerWord * head_dim + i) * kPerWord;
    values[at + lane % kPerWord] = narrow_value[i];
    // A last token's partner holds whatever the block's former owner left, perhaps NaN, and would be multiplied by 0.
    if (clear_next) values[at + 1] = 0;
  }
  if (clear_next && sizeof(Element) == 1) value_scales[lane + 1] = 0.0F;
}

template <typename Element>
void write_row(const WriteTask& task) {
  const mk_shape& shape = *task.shape;
  const CacheGeometry cache(shape);
  const int64_t block = task.table[task.position / cache.block_tokens];
  const int64_t within = task.position % cache.block_tokens;
  const int64_t lane = within % kCacheTile;
  const bool ends = task.last_of_piece || within + 1 == cache.block_tokens;
  const bool clear_next = sizeof(Element) < 4 && lane % 2 == 0 && ends;
  for (int32_t head = 0; head < shape.heads; head++) {
    rotate_head(shape, task.query_norm, task.position, task.qkv + head * shape.head_dim);
  }
  for (int32_t head = 0; head < shape.kv_heads; head++) {
    float* key = task.qkv + (shape.heads + head) * shape.head_dim;
    const float* value = key + shape.kv_heads * shape.head_dim;
    rotate_head(shape, task.key_norm, task.position, key);
    const int64_t offset = cache.tile_offset(block, head, within / kCacheTile);
    write_head<Element>(cache, shape.head_dim, lane, clear_next, key, value, static_cast<uint8_t*>(task.keys) + offset,
                        static_cast<uint8_t*>(task.values) + offset);
  }
}

void rotate_and_write(const WriteTask& task) {
  switch (task.shape->cache_format) {
    case MK_F32: write_row<float>(task); break;
    case MK_BF16: write_row<uint16_t>(task); break;
    default: write_row<int8_t>(task); break;
  }
}

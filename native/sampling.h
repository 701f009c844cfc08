// One token of a row of logits: temperature, top-k, top-p, min-p, typical-p, then the inverse of the cumulative mass.
// Included by kernels.h. Nothing is sorted: every filter keeps the tokens with the greatest of some keys, so all it needs
// is the last key kept. It is found among the few candidates that the maxima of chunks, or a bound on the mass, leave; or,
// where they are many, by passes that each cut the range of keys in eight. What is not kept has no weight from then on.

constexpr int64_t kChunkTokens = 64;
constexpr int64_t kBlockTokens = 256;
constexpr int kBuckets = 512;
constexpr int kCuts = 3;
constexpr int kPasses = 5;
constexpr int64_t kInsertionSorted = 32;
constexpr int64_t kFew = 512;
constexpr double kGreedyBelow = 1e-5;   // dividing by less would overflow, and only the greatest is left
constexpr float kLeastExponent = 87.0F;  // e^-87 and what is less counts as nothing
constexpr float kInfinity = __builtin_inff();

// The chunk's scores; the row's last chunk is filled up with what never comes, in `padded`.
inline const float* chunk_of(const float* scores, int64_t columns, int64_t chunk, float* padded) {
  const int64_t start = chunk * kChunkTokens;
  if (start + kChunkTokens <= columns) return scores + start;
  for (int64_t i = 0; i < kChunkTokens; i++) padded[i] = start + i < columns ? scores[start + i] : -kInfinity;
  return padded;
}

// The greatest of each chunk. False where one is NaN or infinitely great, or all are infinitely small.
MK_KERNEL bool chunk_maxima(const float* scores, int64_t columns, float* maxima, float* greatest) {
  float padded[kChunkTokens];
  Floats strange = splat(0.0F);
  *greatest = -kInfinity;
  for (int64_t chunk = 0; chunk * kChunkTokens < columns; chunk++) {
    const float* here = chunk_of(scores, columns, chunk, padded);
    Floats top = splat(-kInfinity);
    for (int64_t i = 0; i < kChunkTokens; i += kLanes) {
      const Floats x = load(here + i);
      strange = add(strange, select_less(x, splat(kInfinity), splat(0.0F), x));
      top = maximum(top, x);
    }
    maxima[chunk] = reduce_max(top);
    if (maxima[chunk] > *greatest) *greatest = maxima[chunk];
  }
  return reduce_add(strange) == 0.0F && *greatest > -kInfinity;
}

inline Floats weigh(const float* scores, Floats greatest, Floats inverse_temperature) {
  return exponential(multiply(subtract(load(scores), greatest), inverse_temperature));
}

// The sums of the weights of each block of chunks, and the weights where there is room for them; answers the whole.
template <bool keeps_weights>
MK_KERNEL double block_sums(const float* scores, int64_t columns, const float* maxima, float greatest,
                            float inverse_temperature, float* sums, float* weights) {
  float padded[kChunkTokens];
  const Floats top = splat(greatest);
  const Floats inverse = splat(inverse_temperature);
  double whole = 0.0;
  for (int64_t block = 0; block * kBlockTokens < columns; block++) {
    Floats sum = splat(0.0F);
    const int64_t end = divide_up(least((block + 1) * kBlockTokens, columns), kChunkTokens);
    for (int64_t chunk = block * kBlockTokens / kChunkTokens; chunk < end; chunk++) {
      float* kept = weights + chunk * kChunkTokens;
      if ((maxima[chunk] - greatest) * inverse_temperature < -kLeastExponent) {
        if constexpr (keeps_weights) __builtin_memset(kept, 0, kChunkTokens * sizeof(float));
        continue;
      }
      const float* here = chunk_of(scores, columns, chunk, padded);
      MK_UNROLL
      for (int64_t i = 0; i < kChunkTokens; i += kLanes) {
        const Floats weight = weigh(here + i, top, inverse);
        if constexpr (keeps_weights) store(kept + i, weight);
        sum = add(sum, weight);
      }
    }
    sums[block] = reduce_add(sum);
    whole += static_cast<double>(sums[block]);
  }
  return whole;
}

struct Keyed {
  float key;
  float weight;
};

// The key of the last one kept, where those with the greatest keys are kept until their weights reach the target. For
// few: moves the entries about.
MK_KERNEL float last_of_few(Keyed* entries, int64_t count, double target) {
  double masses[kBuckets];
  while (count > kInsertionSorted) {
    float low = entries[0].key;
    float high = low;
    for (int64_t i = 1; i < count; i++) {
      low = entries[i].key < low ? entries[i].key : low;
      high = entries[i].key > high ? entries[i].key : high;
    }
    const float scale = static_cast<float>(kBuckets) / (high - low);
    if (!(scale < 1e30F)) return low;  // all are the same, to any purpose
    const auto bucket_of = [&](float key) {
      const int bucket = static_cast<int>((high - key) * scale);
      return bucket < kBuckets ? bucket : kBuckets - 1;
    };
    for (double& mass : masses) mass = 0.0;
    for (int64_t i = 0; i < count; i++) masses[bucket_of(entries[i].key)] += static_cast<double>(entries[i].weight);
    int found = 0;
    for (int bucket = 0; bucket < kBuckets; bucket++) {
      if (masses[bucket] == 0.0) continue;
      found = bucket;
      if (masses[bucket] >= target) break;
      target -= masses[bucket];
    }
    int64_t inside = 0;
    for (int64_t i = 0; i < count; i++) {
      if (bucket_of(entries[i].key) == found) entries[inside++] = entries[i];
    }
    count = inside;
  }
  for (int64_t i = 1; i < count; i++) {
    const Keyed moved = entries[i];
    int64_t place = i;
    for (; place > 0 && entries[place - 1].key < moved.key; place--) entries[place] = entries[place - 1];
    entries[place] = moved;
  }
  for (int64_t i = 0; i < count; i++) {
    target -= static_cast<double>(entries[i].weight);
    if (target <= 0.0) return entries[i].key;
  }
  return entries[count - 1].key;
}

// Tokens that may be drawn, in their order. There is room for whole blocks; behind the last one is nothing of weight.
struct Candidates {
  int32_t* ids;
  float* scores;
  float* weights;
  float* keys;
  float* sums;  // of blocks
  Keyed* keyed;
  int64_t count;
  bool whole;  // then a candidate's place is its id
};

inline int64_t whole_blocks(int64_t count) { return divide_up(count, kBlockTokens) * kBlockTokens; }

// The weights of keys that reach each of the cuts, which rise.
MK_KERNEL void masses_from(const float* keys, const float* weights, int64_t count, const float* cuts, double* masses) {
  for (int cut = 0; cut < kCuts; cut++) masses[cut] = 0.0;
  for (int64_t start = 0; start < count; start += kBlockTokens) {  // floats would lose the small beside the large
    Floats sums[kCuts];
    MK_UNROLL
    for (int cut = 0; cut < kCuts; cut++) sums[cut] = splat(0.0F);
    for (int64_t i = start; i < start + kBlockTokens; i += kLanes) {
      const Floats key = load(keys + i);
      const Floats weight = load(weights + i);
      MK_UNROLL
      for (int cut = 0; cut < kCuts; cut++) {
        sums[cut] = add(sums[cut], select_less(key, splat(cuts[cut]), splat(0.0F), weight));
      }
    }
    MK_UNROLL
    for (int cut = 0; cut < kCuts; cut++) masses[cut] += static_cast<double>(reduce_add(sums[cut]));
  }
}

// The weighing candidates with keys in [low, ceiling), noted in `keyed`; answers how many.
MK_KERNEL int64_t gather(const float* keys, Candidates& found, float low, float ceiling) {
  const Floats bound = splat(ceiling);
  const Floats nothing = splat(-kInfinity);
  int64_t few = 0;
  for (int64_t start = 0; start < found.count; start += kChunkTokens) {
    Floats any = nothing;
    MK_UNROLL
    for (int64_t i = start; i < start + kChunkTokens; i += kLanes) {
      const Floats key = load(keys + i);
      any = maximum(any, select_less(key, bound, key, nothing));
    }
    if (!(reduce_max(any) >= low)) continue;
    for (int64_t lanes = start; lanes < start + kChunkTokens; lanes += kLanes) {
      const Floats key = load(keys + lanes);
      if (!(reduce_max(select_less(key, bound, key, nothing)) >= low)) continue;
      for (int64_t i = lanes; i < least(lanes + kLanes, found.count); i++) {
        if (keys[i] >= low && keys[i] < ceiling && found.weights[i] > 0.0F) {
          found.keyed[few++] = {keys[i], found.weights[i]};
        }
      }
    }
  }
  return few;
}

// The last key kept, as above, of candidates with these keys: of those that weigh anything. It is in [low, top].
MK_KERNEL float last_kept_within(const float* keys, Candidates& found, double target, float low, float top) {
  float ceiling = kInfinity;  // the last one is below it, and what reaches it weighs `above`
  double above = 0.0;
  for (int pass = 0; pass < kPasses && found.count > kFew && low < top; pass++) {
    float cuts[kCuts];
    double masses[kCuts];
    for (int cut = 0; cut < kCuts; cut++) {
      cuts[cut] = low + (top - low) * (static_cast<float>(cut + 1) / static_cast<float>(kCuts + 1));
    }
    masses_from(keys, found.weights, found.count, cuts, masses);
    int cut = kCuts - 1;
    while (cut >= 0 && masses[cut] < target) cut--;
    if (cut + 1 < kCuts) {
      top = ceiling = cuts[cut + 1];
      above = masses[cut + 1];
    }
    if (cut >= 0) low = cuts[cut];
  }
  const int64_t few = gather(keys, found, low, ceiling);
  return few == 0 ? low : last_of_few(found.keyed, few, target - above);
}

// The same where nothing is known of it.
MK_KERNEL float last_kept(const float* keys, Candidates& found, double target) {
  Floats least_key = splat(-kInfinity);  // with the sign turned
  Floats greatest_key = splat(-kInfinity);
  for (int64_t i = 0; i < found.count; i += kLanes) {
    const Floats key = load(keys + i);
    const Floats weight = load(found.weights + i);
    least_key = maximum(least_key, select_less(splat(0.0F), weight, subtract(splat(0.0F), key), splat(-kInfinity)));
    greatest_key = maximum(greatest_key, select_less(splat(0.0F), weight, key, splat(-kInfinity)));
  }
  return last_kept_within(keys, found, target, -reduce_max(least_key), reduce_max(greatest_key));
}

// Only what has such a key keeps its weight.
inline void keep_from(const float* keys, Candidates& found, float last) {
  const Floats bound = splat(last);
  for (int64_t i = 0; i < found.count; i += kLanes) {
    store(found.weights + i, select_less(load(keys + i), bound, splat(0.0F), load(found.weights + i)));
  }
}

// Those with scores from the bound on.
MK_KERNEL void collect(const float* scores, int64_t columns, const float* maxima, float bound, Candidates& found) {
  float padded[kChunkTokens];
  found.count = 0;
  found.whole = false;
  for (int64_t start = 0; start < columns; start += kChunkTokens) {
    if (!(maxima[start / kChunkTokens] >= bound)) continue;
    const float* here = chunk_of(scores, columns, start / kChunkTokens, padded);
    for (int64_t lanes = 0; lanes < kChunkTokens; lanes += kLanes) {
      if (!(reduce_max(load(here + lanes)) >= bound)) continue;
      for (int64_t i = lanes; i < lanes + kLanes; i++) {
        if (!(here[i] >= bound) || start + i >= columns) continue;
        found.ids[found.count] = static_cast<int32_t>(start + i);
        found.scores[found.count++] = here[i];
      }
    }
  }
}

inline void collect_all(const float* scores, int64_t columns, Candidates& found) {
  found.count = columns;
  found.whole = true;
  __builtin_memcpy(found.scores, scores, static_cast<size_t>(columns) * sizeof(float));
}

// Weights behind the last candidate, up to a whole block, become nothing.
inline void end_candidates(Candidates& found) {
  for (int64_t i = found.count; i < whole_blocks(found.count); i++) {
    found.scores[i] = found.keys[i] = -kInfinity;
    found.weights[i] = 0.0F;
  }
}

MK_KERNEL void weigh_candidates(Candidates& found, float greatest, float inverse_temperature) {
  end_candidates(found);
  const Floats top = splat(greatest);
  const Floats inverse = splat(inverse_temperature);
  for (int64_t i = 0; i < found.count; i += kLanes) store(found.weights + i, weigh(found.scores + i, top, inverse));
}

// The whole mass; the blocks' are in `sums`.
MK_KERNEL double mass_of(Candidates& found) {
  double mass = 0.0;
  for (int64_t start = 0; start < found.count; start += kBlockTokens) {
    Floats sum = splat(0.0F);
    for (int64_t i = start; i < start + kBlockTokens; i += kLanes) sum = add(sum, load(found.weights + i));
    found.sums[start / kBlockTokens] = reduce_add(sum);
    mass += static_cast<double>(found.sums[start / kBlockTokens]);
  }
  return mass;
}

// Finds the k best, with what ties with the last, and weighs them. The k-th best chunk's maximum bounds them from below.
MK_KERNEL void keep_top_k(const mk_draw& draw, int64_t columns, const float* maxima, float greatest,
                          float inverse_temperature, Candidates& found) {
  const int64_t chunks = divide_up(columns, kChunkTokens);
  const double target = static_cast<double>(draw.top_k);
  if (draw.top_k > chunks) {
    collect_all(draw.scores, columns, found);
  } else {
    for (int64_t i = 0; i < chunks; i++) {
      found.keys[i] = maxima[i];
      found.weights[i] = maxima[i] > -kInfinity ? 1.0F : 0.0F;
    }
    found.count = chunks;
    for (int64_t i = chunks; i < whole_blocks(chunks); i++) found.weights[i] = 0.0F;
    collect(draw.scores, columns, maxima, last_kept(found.keys, found, target), found);
  }
  end_candidates(found);
  for (int64_t i = 0; i < found.count; i++) found.weights[i] = found.scores[i] > -kInfinity ? 1.0F : 0.0F;
  collect(draw.scores, columns, maxima, last_kept(found.scores, found, target), found);
  weigh_candidates(found, greatest, inverse_temperature);
}

// The logarithm of a weight below which all together have less than what a share leaves of the mass; 1e-3 is for rounding.
inline float least_logarithm(double share, double mass, int64_t count) {
  const double bound = (1.0 - share) * mass / static_cast<double>(count);
  return bound > 1e-37 ? logf(static_cast<float>(bound)) - 1e-3F : -kLeastExponent;
}

// What the weights from the bound on come to.
MK_KERNEL double mass_from(const float* weights, int64_t count, float bound) {
  const Floats least_weight = splat(bound);
  double mass = 0.0;
  for (int64_t start = 0; start < count; start += kBlockTokens) {
    Floats sum = splat(0.0F);
    MK_UNROLL
    for (int64_t i = start; i < start + kBlockTokens; i += kLanes) {
      const Floats weight = load(weights + i);
      sum = add(sum, select_less(weight, least_weight, splat(0.0F), weight));
    }
    mass += static_cast<double>(reduce_add(sum));
  }
  return mass;
}

// Keeps the nucleus. Mostly it is among the few tokens above a bound, as their own mass proves; where many chunks reach
// the bound, that isn't tried.
MK_KERNEL void keep_nucleus(const mk_draw& draw, int64_t columns, const float* maxima, float greatest,
                            float inverse_temperature, double top_p, Candidates& found) {
  const double whole =
      block_sums<true>(draw.scores, columns, maxima, greatest, inverse_temperature, found.sums, found.weights);
  collect_all(draw.scores, columns, found);
  end_candidates(found);
  const float likely = least_logarithm(top_p, whole, kBlockTokens);
  const float least_score = greatest + likely / inverse_temperature;
  const int64_t chunks = divide_up(columns, kChunkTokens);
  int64_t reaching = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) reaching += maxima[chunk] >= least_score ? 1 : 0;
  if (reaching * 4 <= chunks && mass_from(found.weights, columns, expf(likely) * 1.001F) >= top_p * whole) {
    collect(draw.scores, columns, maxima, least_score, found);
    weigh_candidates(found, greatest, inverse_temperature);
    keep_from(found.scores, found, last_kept(found.scores, found, top_p * whole));
  } else {
    const float low = greatest + least_logarithm(top_p, whole, columns) / inverse_temperature;
    keep_from(found.scores, found, last_kept_within(found.scores, found, top_p * whole, low, greatest));
  }
}

// Keeps the smallest set of those nearest to the expected surprise that holds that part of the mass.
MK_KERNEL void keep_typical(Candidates& found, double typical_p, float greatest, float inverse_temperature) {
  const Floats top = splat(greatest);
  const Floats inverse = splat(inverse_temperature);
  double surprise = 0.0;
  for (int64_t start = 0; start < found.count; start += kBlockTokens) {
    Floats sum = splat(0.0F);
    for (int64_t i = start; i < start + kBlockTokens; i += kLanes) {
      // What has no weight may be infinitely unlikely: e^-87 of nothing is as good.
      const Floats score = multiply(subtract(load(found.scores + i), top), inverse);
      sum = multiply_add(load(found.weights + i), maximum(score, splat(-kLeastExponent)), sum);
    }
    surprise += static_cast<double>(reduce_add(sum));
  }
  const double mass = mass_of(found);
  const Floats expected = splat(static_cast<float>(surprise / mass));
  for (int64_t i = 0; i < found.count; i += kLanes) {
    const Floats score = multiply(subtract(load(found.scores + i), top), inverse);
    store(found.keys + i, subtract(splat(0.0F), absolute(subtract(score, expected))));
  }
  // Who is further off than the bound is either below it or likelier than can be.
  const float average = static_cast<float>(surprise / mass);
  const float furthest = average - least_logarithm(typical_p, mass, found.count);
  const float low = furthest > -average ? -furthest : average;
  const float last = last_kept_within(found.keys, found, typical_p * mass, low, 0.0F);
  keep_from(found.keys, found, last);
}

// The block in whose part of the cumulative mass the target falls, the last of any weight where rounding leaves none;
// takes what is before it off the target.
inline int64_t block_at(const float* sums, int64_t blocks, double* target) {
  int64_t block = 0;
  double before = 0.0;
  double mass = 0.0;
  for (int64_t i = 0; i < blocks; i++) {
    if (!(sums[i] > 0.0F)) continue;
    block = i;
    before = mass;
    mass += static_cast<double>(sums[i]);
    if (mass > *target) break;
  }
  *target -= before;
  return block;
}

// The same within a block.
inline int64_t token_at(const float* weights, int64_t count, double target) {
  int64_t last = 0;
  double mass = 0.0;
  for (int64_t i = 0; i < count; i++) {
    if (!(weights[i] > 0.0F)) continue;
    last = i;
    mass += static_cast<double>(weights[i]);
    if (mass > target) break;
  }
  return last;
}

MK_KERNEL int64_t draw_candidate(Candidates& found, double number) {
  double target = number * mass_of(found);
  const int64_t start = block_at(found.sums, divide_up(found.count, kBlockTokens), &target) * kBlockTokens;
  const int64_t place = start + token_at(found.weights + start, least(kBlockTokens, found.count - start), target);
  return found.whole ? place : found.ids[place];
}

// From the whole row, whose blocks have these sums.
MK_KERNEL int64_t draw_unfiltered(const float* scores, int64_t columns, float greatest, float inverse_temperature,
                                  const float* sums, double target) {
  const int64_t start = block_at(sums, divide_up(columns, kBlockTokens), &target) * kBlockTokens;
  const int64_t count = least(kBlockTokens, columns - start);
  float padded[kChunkTokens];
  float weights[kBlockTokens];
  for (int64_t i = 0; i < count; i += kChunkTokens) {
    const float* here = chunk_of(scores, columns, (start + i) / kChunkTokens, padded);
    for (int64_t j = 0; j < kChunkTokens; j += kLanes) {
      store(weights + i + j, weigh(here + j, splat(greatest), splat(inverse_temperature)));
    }
  }
  return start + token_at(weights, count, target);
}

inline int64_t sample_scratch_bytes(int64_t columns) {
  const int64_t room = whole_blocks(columns);
  const int64_t per_token = sizeof(int32_t) + 3 * sizeof(float) + sizeof(Keyed);
  return room * per_token + (room / kChunkTokens + room / kBlockTokens) * static_cast<int64_t>(sizeof(float));
}

int64_t sample_row(const mk_draw& draw, int64_t columns, void* scratch) {
  const int64_t room = whole_blocks(columns);
  Candidates found = {};
  found.keyed = static_cast<Keyed*>(scratch);
  found.scores = reinterpret_cast<float*>(found.keyed + room);
  found.weights = found.scores + room;
  found.keys = found.weights + room;
  found.ids = reinterpret_cast<int32_t*>(found.keys + room);
  float* maxima = reinterpret_cast<float*>(found.ids + room);
  found.sums = maxima + room / kChunkTokens;
  float greatest;
  if (!chunk_maxima(draw.scores, columns, maxima, &greatest)) return -1;
  if (draw.temperature < kGreedyBelow) {
    int64_t i = 0;
    while (maxima[i / kChunkTokens] != greatest) i += kChunkTokens;
    while (draw.scores[i] != greatest) i++;
    return i;
  }
  const float inverse = static_cast<float>(1.0 / draw.temperature);
  const double top_p = draw.top_p > 1e-6 ? draw.top_p : 1e-6;  // at 0 rounding could leave none
  const float least_share = static_cast<float>(draw.min_p);
  const bool nucleus = draw.top_p < 1.0;
  if (draw.top_k > 0 && draw.top_k < columns) {
    keep_top_k(draw, columns, maxima, greatest, inverse, found);
    if (nucleus) keep_from(found.scores, found, last_kept(found.scores, found, top_p * mass_of(found)));
  } else if (nucleus) {
    keep_nucleus(draw, columns, maxima, greatest, inverse, top_p, found);
  } else if (draw.min_p > 0.0) {
    collect(draw.scores, columns, maxima, greatest + (logf(least_share) - 1e-3F) / inverse, found);
    weigh_candidates(found, greatest, inverse);
  } else if (draw.typical_p < 1.0) {
    collect_all(draw.scores, columns, found);
    weigh_candidates(found, greatest, inverse);
  } else {
    const double whole = block_sums<false>(draw.scores, columns, maxima, greatest, inverse, found.sums, nullptr);
    return draw_unfiltered(draw.scores, columns, greatest, inverse, found.sums, draw.number * whole);
  }
  if (draw.min_p > 0.0) keep_from(found.weights, found, least_share);
  if (draw.typical_p < 1.0) keep_typical(found, draw.typical_p, greatest, inverse);
  return draw_candidate(found, draw.number);
}

// The greatest scores' ids, best first and of equals the first, -1 where there are no more; answers the logarithm of the
// sum of the exponentials of all, NaN where they are no distribution.
double score_row(const float* scores, int64_t columns, int64_t top, int64_t* best, void* scratch) {
  float* maxima = static_cast<float*>(scratch);
  float* sums = maxima + divide_up(columns, kChunkTokens);
  float greatest;
  for (int64_t i = 0; i < top; i++) best[i] = -1;
  if (!chunk_maxima(scores, columns, maxima, &greatest)) return __builtin_nan("");
  int64_t kept = 0;
  float last = -kInfinity;  // of as many as are wanted
  for (int64_t start = 0; start < columns && top > 0; start += kChunkTokens) {
    if (kept == top && !(maxima[start / kChunkTokens] > last)) continue;
    for (int64_t i = start; i < least(start + kChunkTokens, columns); i++) {
      if (kept == top && !(scores[i] > last)) continue;
      int64_t place = kept < top ? kept++ : top - 1;
      for (; place > 0 && scores[best[place - 1]] < scores[i]; place--) best[place] = best[place - 1];
      best[place] = i;
      if (kept == top) last = scores[best[top - 1]];
    }
  }
  const double whole = block_sums<false>(scores, columns, maxima, greatest, 1.0F, sums, nullptr);
  return static_cast<double>(greatest) + log(whole);
}

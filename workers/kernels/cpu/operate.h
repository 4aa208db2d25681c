// The operators of operators.h, sixteen numbers at a time. Included by each level's file.

typedef uint32_t WordLanes __attribute__((vector_size(lanes * 4)));
typedef uint16_t HalfLanes __attribute__((vector_size(lanes * 2)));

INLINE uint16_t float_to_half(float number) {
  uint32_t bits;
  __builtin_memcpy(&bits, &number, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x47800000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // below 2^-14: one half has the unit of the smallest numbers, so adding it rounds
    float shifted;
    __builtin_memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

// Each type: how sixteen numbers of it become floats, how floats are stored, and what storing leaves of them.
struct Float32 {
  typedef float Stored;
  INLINE Floats read(const float* from) { return load(from); }
  INLINE void write(float* to, Floats numbers) { store(to, numbers); }
  INLINE Floats rounded(Floats numbers) { return numbers; }
};

struct Float16 {
  typedef uint16_t Stored;
  INLINE Floats read(const uint16_t* from) { return load_halves(from); }
  INLINE void write(uint16_t* to, Floats numbers) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)numbers.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    EACH_PART _mm_storeu_si128((__m128i*)to + part,
                               _mm256_cvtps_ph((__m256)numbers.part[part], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < 16; lane++) to[lane] = float_to_half(numbers.part[lane / lanes][lane % lanes]);
#endif
  }
  INLINE Floats rounded(Floats numbers) {
    uint16_t halves[16];
    write(halves, numbers);
    return read(halves);
  }
};

struct Bfloat16 {
  typedef uint16_t Stored;
  INLINE Floats read(const uint16_t* from) {
    Floats result;
    EACH_PART {
      HalfLanes halves;
      __builtin_memcpy(&halves, from + part * lanes, sizeof halves);
      result.part[part] = (FloatLanes)(__builtin_convertvector(halves, WordLanes) << 16);
    }
    return result;
  }
  // To the nearest, ties to even, by integers: the instruction for it takes the smallest numbers for zero.
  INLINE Floats rounded(Floats numbers) {
    EACH_PART {
      const WordLanes bits = (WordLanes)numbers.part[part];
      const WordLanes kept = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
      numbers.part[part] = numbers.part[part] == numbers.part[part] ? (FloatLanes)kept
                                                                     : (FloatLanes)(WordLanes{} + 0x7fc00000);
    }
    return numbers;
  }
  INLINE void write(uint16_t* to, Floats numbers) {
    const Floats kept = rounded(numbers);
    EACH_PART {
      const HalfLanes halves = __builtin_convertvector((WordLanes)kept.part[part] >> 16, HalfLanes);
      __builtin_memcpy(to + part * lanes, &halves, sizeof halves);
    }
  }
};

// As read and write, of the `left` numbers that a vector still has where those are fewer than sixteen.
template <class Type>
INLINE Floats read_left(const typename Type::Stored* from, int64_t left) {
  if (left >= 16) return Type::read(from);
  typename Type::Stored padded[16] = {};
  __builtin_memcpy(padded, from, left * sizeof *from);
  return Type::read(padded);
}
template <class Type>
INLINE void write_left(typename Type::Stored* to, Floats numbers, int64_t left) {
  if (left >= 16) return Type::write(to, numbers);
  typename Type::Stored padded[16];
  Type::write(padded, numbers);
  __builtin_memcpy(to, padded, left * sizeof *to);
}

template <class Type>
static void norm_vector(typename Type::Stored* input, const typename Type::Stored* update,
                        const typename Type::Stored* weight, typename Type::Stored* out, int64_t size,
                        float epsilon) {
  Floats squares = all(0);
  for (int64_t i = 0; i < size; i += 16) {
    Floats numbers = read_left<Type>(input + i, size - i);
    if (update != nullptr) {
      numbers = Type::rounded(numbers + read_left<Type>(update + i, size - i));
      write_left<Type>(input + i, numbers, size - i);
    }
    squares = multiply_add(numbers, numbers, squares);
  }
  const Floats scale = all(1 / __builtin_sqrtf(sum(squares) / size + epsilon));
  for (int64_t i = 0; i < size; i += 16) {
    const Floats normed = Type::rounded(read_left<Type>(input + i, size - i) * scale);
    write_left<Type>(out + i, normed * read_left<Type>(weight + i, size - i), size - i);
  }
}

template <class Type>
static void norm_rows(const Norm& work, int64_t first, int64_t end) {
  typedef typename Type::Stored Stored;
  const Vectors& input = work.input;
  for (int64_t row = first; row < end; row++)
    for (int64_t head = 0; head < input.heads; head++) {
      const int64_t place = (row * input.heads + head) * input.size;
      norm_vector<Type>((Stored*)input.first + row * input.stride + head * input.size,
                        work.update == nullptr ? nullptr : (const Stored*)work.update + place,
                        (const Stored*)work.weight, (Stored*)work.out + place, input.size, work.epsilon);
    }
}

template <class Type>
static void rotate_rows(const Rotation& work, int64_t first, int64_t end) {
  typedef typename Type::Stored Stored;
  const Vectors& heads = work.heads;
  const int64_t half = heads.size / 2;
  for (int64_t row = first; row < end; row++)
    for (int64_t head = 0; head < heads.heads; head++) {
      Stored* low = (Stored*)heads.first + row * heads.stride + head * heads.size;
      for (int64_t i = 0; i < half; i += 16) {
        const int64_t left = half - i;
        const Floats cos = read_left<Type>((const Stored*)work.cos + row * half + i, left);
        const Floats sin = read_left<Type>((const Stored*)work.sin + row * half + i, left);
        const Floats a = read_left<Type>(low + i, left), b = read_left<Type>(low + half + i, left);
        write_left<Type>(low + i, Type::rounded(a * cos) - Type::rounded(b * sin), left);
        write_left<Type>(low + half + i, Type::rounded(b * cos) + Type::rounded(a * sin), left);
      }
    }
}

// x / (1 + exp(-x)), with an exponential that cannot overflow.
INLINE Floats silu(Floats x) {
  Floats negative;
  EACH_PART negative.part[part] = x.part[part] > 0 ? -x.part[part] : x.part[part];
  const Floats power = exponential(negative);
  EACH_PART {
    const FloatLanes above = x.part[part] > 0 ? x.part[part] : x.part[part] * power.part[part];
    x.part[part] = above / (1 + power.part[part]);
  }
  return x;
}

template <class Type>
static void gate_rows(const Gating& work, int64_t first, int64_t end) {
  typedef typename Type::Stored Stored;
  for (int64_t row = first; row < end; row++) {
    const Stored* gate = (const Stored*)work.gate_up + row * 2 * work.size;
    Stored* out = (Stored*)work.out + row * work.size;
    for (int64_t i = 0; i < work.size; i += 16) {
      const int64_t left = work.size - i;
      const Floats gated = Type::rounded(silu(read_left<Type>(gate + i, left)));
      write_left<Type>(out + i, gated * read_left<Type>(gate + work.size + i, left), left);
    }
  }
}

// What the weights of a vector's parts are divided by: the algebra of workers/partials.py. The largest part's is 1
// before it is shared, and NaN anywhere comes out.
struct Shares {
  float peak, total;
};
static Shares shares_of(const Parts& parts, int64_t apart, int64_t vector, float own) {
  Shares shares = {own, 0};
  for (int64_t part = 0; part < parts.count; part++) {
    const float lse = parts.lse[part * apart + vector];
    shares.peak = lse > shares.peak ? lse : shares.peak;
  }
  shares.total = __builtin_expf(own - shares.peak);
  for (int64_t part = 0; part < parts.count; part++)
    shares.total += __builtin_expf(parts.lse[part * apart + vector] - shares.peak);
  return shares;
}
INLINE Floats weight(const Shares& shares, float lse) {
  return all(__builtin_expf(lse - shares.peak) / shares.total);
}

// One vector of a row: what it sees first, of type `Own` and with the logarithm of its weight, and the parts, whose
// vectors of one row and head lie `apart` vectors from part to part.
template <class Type, class Own>
static void merge_vector(const Parts& parts, int64_t apart, int64_t vector, int64_t size,
                         const typename Own::Stored* first, float own, typename Type::Stored* merged) {
  const Shares shares = shares_of(parts, apart, vector, own);
  for (int64_t begin = 0; begin < size; begin += 64) {
    const int64_t count = size - begin < 64 ? size - begin : 64;
    Floats sums[4], share = weight(shares, own);
    for (int64_t i = 0; i < count; i += 16) sums[i / 16] = read_left<Own>(first + begin + i, count - i) * share;
    for (int64_t part = 0; part < parts.count; part++) {
      const int64_t place = part * apart + vector;
      const float* out = parts.out + place * size + begin;
      share = weight(shares, parts.lse[place]);
      for (int64_t i = 0; i < count; i += 16)
        sums[i / 16] = multiply_add(read_left<Float32>(out + i, count - i), share, sums[i / 16]);
    }
    for (int64_t i = 0; i < count; i += 16) write_left<Type>(merged + begin + i, sums[i / 16], count - i);
  }
}

template <class Type>
static void own_vector(const OwnRows& work, int64_t vector, const typename Type::Stored* query,
                       const typename Type::Stored* key, const typename Type::Stored* value) {
  const int64_t size = work.query.size;
  typename Type::Stored* merged = (typename Type::Stored*)work.merged + vector * size;
  if (work.parts.count == 0) {
    __builtin_memcpy(merged, value, size * sizeof *merged);
    return;
  }
  Floats products = all(0);
  for (int64_t i = 0; i < size; i += 16)
    products = multiply_add(read_left<Type>(query + i, size - i), read_left<Type>(key + i, size - i), products);
  merge_vector<Type, Type>(work.parts, work.query.rows * work.query.heads, vector, size, value,
                           sum(products) * work.scale, merged);
}

template <class Type>
static void merge_rows(const MergedRows& work, int64_t first, int64_t end) {
  for (int64_t vector = first * work.heads; vector < end * work.heads; vector++)
    merge_vector<Type, Float32>(work.parts, work.rows * work.heads, vector, work.size,
                                work.own.out + vector * work.size, work.own.lse[vector],
                                (typename Type::Stored*)work.merged + vector * work.size);
}

template <class Type>
static void own_rows(const OwnRows& work, int64_t first, int64_t end) {
  typedef typename Type::Stored Stored;
  const int64_t heads = work.query.heads, size = work.query.size, group = heads / work.key.heads;
  for (int64_t row = first; row < end; row++)
    for (int64_t head = 0; head < heads; head++) {
      const int64_t shared = head / group * size;
      own_vector<Type>(work, row * heads + head,
                       (const Stored*)work.query.first + row * work.query.stride + head * size,
                       (const Stored*)work.key.first + row * work.key.stride + shared,
                       (const Stored*)work.value.first + row * work.value.stride + shared);
    }
}

// How many numbers are looked at before the place of the largest is narrowed down.
constexpr int64_t stretch = 1024;

template <class Type>
static void best_of_row(const typename Type::Stored* row, int64_t size, int64_t* place, float* best, float* second) {
  const Floats nothing = all(-__builtin_inff());
  Floats firsts = nothing, seconds = nothing, poison = all(0);
  float most = -__builtin_inff();
  int64_t where = 0;
  for (int64_t begin = 0; begin < size; begin += stretch) {
    const int64_t end = begin + stretch < size ? begin + stretch : size;
    for (int64_t i = begin; i < end; i += 16) {
      Floats numbers = read_left<Type>(row + i, size - i);
      if (size - i < 16) numbers = choose((1u << (size - i)) - 1, numbers, nothing);
      EACH_PART {
        const FloatLanes x = numbers.part[part], f = firsts.part[part], s = seconds.part[part];
        const FloatLanes lower = x > f ? f : x;  // of the two, what is not the largest of its lane
        seconds.part[part] = lower > s ? lower : s;
        firsts.part[part] = x > f ? x : f;
        poison.part[part] += x != x ? x : FloatLanes{};
      }
    }
    const float found = largest(firsts);
    if (found > most) {
      most = found;
      where = begin;
    }
  }
  float lanes_first[16], lanes_second[16];
  store(lanes_first, firsts);
  store(lanes_second, seconds);
  int winner = 0;
  for (int lane = 0; lane < 16; lane++)
    if (lanes_first[lane] > lanes_first[winner]) winner = lane;
  float next = lanes_second[winner];
  for (int lane = 0; lane < 16; lane++)
    if (lane != winner && lanes_first[lane] > next) next = lanes_first[lane];
  const float spoiled = sum(poison);
  *best = spoiled == spoiled ? most : spoiled;
  *second = next;
  float number[16];
  for (*place = where; *place < size - 1; ++*place) {
    store(number, read_left<Type>(row + *place, 1));
    if (number[0] == most) break;
  }
}

template <class Type>
static void best_rows(const BestTwo& work, int64_t first, int64_t end) {
  typedef typename Type::Stored Stored;
  for (int64_t row = first; row < end; row++)
    best_of_row<Type>((const Stored*)work.numbers + row * work.size, work.size, work.place + row, work.best + row,
                      work.second + row);
}

#include "product.h"

#define BY_TYPE(operate, work)                                       \
  switch (type) {                                                    \
    case CacheType::float32: return operate<Float32>(work, first, end);  \
    case CacheType::float16: return operate<Float16>(work, first, end);  \
    default: return operate<Bfloat16>(work, first, end);             \
  }
static void norm(CacheType type, const Norm& work, int64_t first, int64_t end) { BY_TYPE(norm_rows, work) }
static void rotate(CacheType type, const Rotation& work, int64_t first, int64_t end) { BY_TYPE(rotate_rows, work) }
static void gate(CacheType type, const Gating& work, int64_t first, int64_t end) { BY_TYPE(gate_rows, work) }
static void own(CacheType type, const OwnRows& work, int64_t first, int64_t end) { BY_TYPE(own_rows, work) }
static void merge(CacheType type, const MergedRows& work, int64_t first, int64_t end) { BY_TYPE(merge_rows, work) }
static void best(CacheType type, const BestTwo& work, int64_t first, int64_t end) { BY_TYPE(best_rows, work) }
#undef BY_TYPE

// All of them: a level names this list, and cannot leave one out.
constexpr Operators operators = {norm, rotate, gate, own, merge, best, product};

// A libcublasLt.so.13 that multiplies on the CPU, in streams of the stand-in driver: what kernels/src/cuda/gemm asks for.
// Matrices are column-major. It refuses what Hopper refuses, and algorithms used with pointers that they are not for.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "../types.h"

// Of the stand-in driver.
extern "C" int emulator_enqueue(void* stream, int (*work)(void*), void (*release)(void*), void* data);
extern "C" int emulator_is_device_memory(uint64_t address, size_t bytes);

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };                    // cublasStatus_t
enum { R_32F = 0, R_16BF = 14, R_8F_E4M3 = 28 };                                                       // cudaDataType_t
enum { TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8, A_SCALE = 17, B_SCALE = 18, A_SCALE_MODE = 31, B_SCALE_MODE = 32 };
enum { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4, SCALE_OUTER_VECTOR = 3 };
enum { MAX_WORKSPACE = 1, MIN_ALIGNMENT_A = 5, MIN_ALIGNMENT_D = 8 };
constexpr int ALGORITHMS = 3;

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
  size_t element_bytes() const { return type == R_32F ? 4 : type == R_16BF ? 2 : 1; }
  size_t bytes() const { return (leading * (columns - 1) + rows) * element_bytes(); }
};
struct Description {
  int transpose_a = 0, transpose_b = 0, epilogue = EPILOGUE_DEFAULT, a_scale_mode = 0, b_scale_mode = 0;
  uint64_t bias = 0, a_scale = 0, b_scale = 0;
};
struct Preference {
  uint64_t workspace = 0;
  unsigned alignment[4] = {256, 256, 256, 256};  // of A, B, C and D
};
struct Algorithm {
  uint64_t magic, index;
  unsigned alignment[4];
  uint64_t workspace, unused[3];
};
static_assert(sizeof(Algorithm) == 64, "the size of a cublasLtMatmulAlgo_t");
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "the size of a cublasLtMatmulHeuristicResult_t");
constexpr uint64_t MAGIC = 0x62746e2d616c676f;

struct Product {
  Description description;
  Layout a, b, d;
  const void *of_a, *of_b;
  void* of_d;
  float alpha, beta;
};

float load(const void* p, int type, size_t i) {
  if (type == R_32F) return ((const float*)p)[i];
  if (type == R_16BF) return ((const __nv_bfloat16*)p)[i];
  return emulator_e4m3_to_float(((const uint8_t*)p)[i]);
}

// A as [k][m] and B as [n][k], so that the innermost loop runs over neighbours.
std::vector<float> by_depth(const Product& p, size_t m, size_t depth) {
  std::vector<float> a(m * depth);
  for (size_t i = 0; i < m; i++)
    for (size_t k = 0; k < depth; k++)
      a[k * m + i] = load(p.of_a, p.a.type, p.description.transpose_a ? k + i * p.a.leading : i + k * p.a.leading);
  return a;
}

__attribute__((optimize("O3"))) int multiply(void* data) {
  const Product& p = *(const Product*)data;
  const Description& description = p.description;
  size_t m = p.d.rows, n = p.d.columns, depth = description.transpose_a ? p.a.rows : p.a.columns;
  std::vector<float> a = by_depth(p, m, depth), sums(m);
  for (size_t j = 0; j < n; j++) {
    std::fill(sums.begin(), sums.end(), 0.f);
    for (size_t k = 0; k < depth; k++) {
      float b = load(p.of_b, p.b.type, k + j * p.b.leading);
      for (size_t i = 0; i < m; i++) sums[i] += a[k * m + i] * b;
    }
    for (size_t i = 0; i < m; i++) {
      float sum = sums[i];
      if (description.a_scale) sum *= ((const float*)description.a_scale)[description.a_scale_mode == SCALE_OUTER_VECTOR ? i : 0];
      if (description.b_scale) sum *= ((const float*)description.b_scale)[description.b_scale_mode == SCALE_OUTER_VECTOR ? j : 0];
      size_t at = i + j * p.d.leading;
      sum *= p.alpha;
      if (p.beta != 0) sum += p.beta * load(p.of_d, p.d.type, at);
      if (description.epilogue == EPILOGUE_BIAS) sum += load((const void*)description.bias, p.d.type, i);
      if (p.d.type == R_32F) ((float*)p.of_d)[at] = sum;
      else ((__nv_bfloat16*)p.of_d)[at] = sum;
    }
  }
  return 0;
}

bool supported(const Description& d, const Layout& a, const Layout& b, const Layout& c) {
  if (d.transpose_b || a.type != b.type || (c.type != R_32F && c.type != R_16BF)) return false;
  if (d.epilogue != EPILOGUE_DEFAULT && d.epilogue != EPILOGUE_BIAS) return false;
  if (a.type == R_16BF) return true;
  // fp8 products are of A transposed only, and of whole units of 16 bytes.
  bool outer = d.a_scale_mode == SCALE_OUTER_VECTOR && d.b_scale_mode == SCALE_OUTER_VECTOR;
  return a.type == R_8F_E4M3 && d.transpose_a && a.rows % 16 == 0 && c.rows % 16 == 0 && (!outer || c.type == R_16BF);
}

bool usable(const Algorithm& algorithm, const void* const pointers[4], size_t workspace) {
  if (algorithm.magic != MAGIC || algorithm.index >= ALGORITHMS || workspace < algorithm.workspace) return false;
  for (int i = 0; i < 4; i++)
    if ((uintptr_t)pointers[i] % algorithm.alignment[i]) return false;
  return true;
}

bool on_device(const void* p, size_t bytes) { return emulator_is_device_memory((uint64_t)p, bytes); }

}  // namespace

#define BLAS_API extern "C" __attribute__((visibility("default"))) int

BLAS_API cublasLtCreate(void** handle) {
  *handle = malloc(1);
  return SUCCESS;
}
BLAS_API cublasLtDestroy(void* handle) {
  free(handle);
  return SUCCESS;
}
BLAS_API cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *layout = new Layout{type, rows, columns, leading};
  return SUCCESS;
}
BLAS_API cublasLtMatrixLayoutDestroy(void* layout) {
  delete (Layout*)layout;
  return SUCCESS;
}
BLAS_API cublasLtMatmulDescCreate(void** description, int, int) {
  *description = new Description;
  return SUCCESS;
}
BLAS_API cublasLtMatmulDescDestroy(void* description) {
  delete (Description*)description;
  return SUCCESS;
}
BLAS_API cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* value, size_t bytes) {
  Description& d = *(Description*)description;
  struct Field { int attribute; void* at; size_t bytes; };
  const Field fields[] = {{TRANSA, &d.transpose_a, 4},       {TRANSB, &d.transpose_b, 4},
                          {EPILOGUE, &d.epilogue, 4},        {A_SCALE_MODE, &d.a_scale_mode, 4},
                          {B_SCALE_MODE, &d.b_scale_mode, 4}, {BIAS_POINTER, &d.bias, 8},
                          {A_SCALE, &d.a_scale, 8},          {B_SCALE, &d.b_scale, 8}};
  for (const Field& field : fields) {
    if (field.attribute != attribute) continue;
    if (field.bytes != bytes) return INVALID_VALUE;
    memcpy(field.at, value, bytes);
  }
  return SUCCESS;
}
BLAS_API cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new Preference;
  return SUCCESS;
}
BLAS_API cublasLtMatmulPreferenceDestroy(void* preference) {
  delete (Preference*)preference;
  return SUCCESS;
}
BLAS_API cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  Preference& p = *(Preference*)preference;
  if (attribute == MAX_WORKSPACE && bytes == 8) memcpy(&p.workspace, value, 8);
  else if (attribute >= MIN_ALIGNMENT_A && attribute <= MIN_ALIGNMENT_D && bytes == 4) memcpy(&p.alignment[attribute - MIN_ALIGNMENT_A], value, 4);
  else return INVALID_VALUE;
  return SUCCESS;
}
BLAS_API cublasLtMatmulAlgoGetHeuristic(void*, void* description, void* a, void* b, void* c, void*, void* preference, int wanted,
                                        Heuristic* results, int* found) {
  *found = 0;
  if (!supported(*(Description*)description, *(Layout*)a, *(Layout*)b, *(Layout*)c)) return NOT_SUPPORTED;
  const Preference& p = *(Preference*)preference;
  for (; *found < wanted && *found < ALGORITHMS; ++*found) {
    // Later ones want more workspace.
    uint64_t workspace = *found * (1 << 20);
    if (workspace > p.workspace) break;
    Heuristic& result = results[*found];
    result = {{MAGIC, (uint64_t)*found, {}, workspace, {}}, workspace, SUCCESS, 1.f, {}};
    memcpy(result.algorithm.alignment, p.alignment, sizeof p.alignment);
  }
  return SUCCESS;
}
BLAS_API cublasLtMatmulAlgoCheck(void*, void* description, void* a, void* b, void* c, void*, const Algorithm* algorithm, Heuristic* result) {
  if (!supported(*(Description*)description, *(Layout*)a, *(Layout*)b, *(Layout*)c)) return NOT_SUPPORTED;
  if (algorithm->magic != MAGIC || algorithm->index >= ALGORITHMS) return INVALID_VALUE;
  *result = {*algorithm, algorithm->workspace, SUCCESS, 1.f, {}};
  return SUCCESS;
}
BLAS_API cublasLtMatmul(void*, void* description, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                        const float* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
                        void* workspace, size_t workspace_bytes, void* stream) {
  Product p = {*(Description*)description, *(Layout*)a_layout, *(Layout*)b_layout, *(Layout*)d_layout, a, b, d, *alpha, *beta};
  const void* pointers[] = {a, b, c, d};
  if (!supported(p.description, p.a, p.b, p.d)) return NOT_SUPPORTED;
  if (c != d || !usable(*algorithm, pointers, workspace_bytes)) return INVALID_VALUE;
  bool mapped = on_device(a, p.a.bytes()) && on_device(b, p.b.bytes()) && on_device(d, p.d.bytes());
  if (!mapped || (workspace_bytes && !on_device(workspace, workspace_bytes))) return EXECUTION_FAILED;
  auto release = [](void* data) { delete (Product*)data; };
  return emulator_enqueue(stream, multiply, release, new Product(p)) ? EXECUTION_FAILED : SUCCESS;
}

/* Operators of ONNX Runtime's CUDA provider: whoever opened the session launches their kernels.
 *
 * A node's compute function collects the addresses and shapes of its inputs and outputs and hands
 * them to a callback, with the stream. That notes what it launches, so it is asked once for each
 * number of rows and tokens: see host_launches.h. Decode runs as a CUDA graph besides.
 *
 *   ClaLinear(x, w, norm?, residual?, scales?) -> y    norm(x) w^T + residual, or gated: SwiGLU of both;
 *                                                      w is [n, k], or with scales MatMulNBits' [n, blocks, bytes]
 *   ClaRotate(q, cos, sin, starts) -> q       rotated queries
 *   ClaRotateAppend(qkv, cos, sin, starts, past, past) -> q, present, present
 *   ClaAttention(q, keys, values, lengths) -> y
 *
 * Each exists in domain cla.float16 and in cla.bfloat16. Attribute `node` tells nodes apart.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"

enum { LINEAR, ROTATE, ROTATE_APPEND, ATTENTION, KINDS };
enum { MAX_INPUTS = 6, MAX_OUTPUTS = 3, MAX_RANK = 4 };

typedef struct {
  const void *data; /* null: left out */
  int64_t rank;
  int64_t dims[MAX_RANK];
} Argument;

typedef struct {
  int64_t node;
  int64_t kind;
  void *stream;
  struct Notes **notes; /* of the node */
  Argument inputs[MAX_INPUTS];
  Argument outputs[MAX_OUTPUTS];
} HostCall;

typedef int (*Callback)(const HostCall *call); /* 0: launched */
static Callback callback;

__attribute__((visibility("default"))) void cla_set_callback(Callback chosen) { callback = chosen; }

#include "host_launches.h"

typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands it back */
  int kind, inputs, outputs, element;
} Operator;

typedef struct {
  const OrtApi *api;
  const Operator *op;
  int64_t node, gated;
  struct Notes *notes;
} Kernel;

#define TRY(call)                       \
  do {                                  \
    OrtStatus *status = (call);         \
    if (status) return status;          \
  } while (0)

static OrtStatus *fill(const OrtApi *api, const OrtValue *value, Argument *out) {
  OrtTensorInfo *info;
  size_t rank = 0;
  TRY(api->GetTensorMutableData((OrtValue *)value, (void **)&out->data));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetDimensionsCount(info, &rank);
  if (!status && rank <= MAX_RANK) status = api->GetDimensions(info, out->dims, rank);
  api->ReleaseTensorInfo(info);
  out->rank = (int64_t)rank;
  if (!status && rank > MAX_RANK)
    status = api->CreateStatus(STATUS_INVALID_ARGUMENT, "more than four dimensions");
  return status;
}

static OrtStatus *compute(void *state, OrtContext *context) {
  Kernel *kernel = state;
  const OrtApi *api = kernel->api;
  const Operator *op = kernel->op;
  HostCall call = {.node = kernel->node, .kind = op->kind, .notes = &kernel->notes};
  for (int i = 0; i < op->inputs; i++) {
    const OrtValue *value = NULL;
    TRY(api->KernelContext_GetInput(context, i, &value));
    if (value) TRY(fill(api, value, &call.inputs[i]));
  }
  for (int i = 0; i < op->outputs; i++) {
    const Argument *like = &call.inputs[i ? 3 + i : 0]; /* a present is like its past */
    Argument *out = &call.outputs[i];
    memcpy(out->dims, like->dims, sizeof out->dims);
    out->rank = like->rank;
    if (op->kind == LINEAR)
      out->dims[out->rank - 1] = call.inputs[1].dims[0] / (kernel->gated ? 2 : 1);
    if (op->kind == ROTATE_APPEND && i == 0)
      out->dims[out->rank - 1] -= 2 * call.inputs[4].dims[1] * call.inputs[4].dims[3];
    OrtValue *value;
    TRY(api->KernelContext_GetOutput(context, i, out->dims, (size_t)out->rank, &value));
    TRY(api->GetTensorMutableData(value, (void **)&out->data));
  }
  TRY(api->KernelContext_GetGPUComputeStream(context, &call.stream));
  int status = cla_run(&call);
  if (!status) return NULL;
  char message[80];
  snprintf(message, sizeof message, "the kernel could not be launched (%d)", status);
  return api->CreateStatus(STATUS_FAIL, message);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **out) {
  Kernel kernel = {.api = api, .op = (const Operator *)op};
  TRY(api->KernelInfoGetAttribute_int64(info, "node", &kernel.node));
  if (kernel.op->kind == LINEAR)
    TRY(api->KernelInfoGetAttribute_int64(info, "gated", &kernel.gated));
  Kernel *made = malloc(sizeof kernel);
  if (!made) return api->CreateStatus(STATUS_FAIL, "out of memory");
  *made = kernel;
  *out = made;
  return NULL;
}

static const Operator *of(const OrtCustomOp *op) { return (const Operator *)op; }
static const char *name(const OrtCustomOp *op) {
  static const char *names[KINDS] = {"ClaLinear", "ClaRotate", "ClaRotateAppend", "ClaAttention"};
  return names[of(op)->kind];
}
static const char *provider(const OrtCustomOp *op) { return (void)op, "CUDAExecutionProvider"; }
static int input_type(const OrtCustomOp *op, size_t i) {
  int kind = of(op)->kind;
  if (kind == LINEAR && i == 1) return ELEMENT_ANY; /* packed weights are bytes */
  if (kind == ATTENTION && i == 3) return ELEMENT_INT32;
  if (kind == ROTATE || kind == ROTATE_APPEND) {
    if (i == 1 || i == 2) return ELEMENT_FLOAT;
    if (i == 3) return ELEMENT_INT64;
  }
  return of(op)->element;
}
static int output_type(const OrtCustomOp *op, size_t i) { return (void)i, of(op)->element; }
static size_t inputs(const OrtCustomOp *op) { return (size_t)of(op)->inputs; }
static size_t outputs(const OrtCustomOp *op) { return (size_t)of(op)->outputs; }
static int input_kind(const OrtCustomOp *op, size_t i) {
  return of(op)->kind == LINEAR && i >= 2 ? OPTIONAL : REQUIRED;
}
static int output_kind(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, MEMORY_DEFAULT; }
static int version(const OrtCustomOp *op) { return (void)op, 1; }
static void destroy(void *kernel) {
  forget(((Kernel *)kernel)->notes);
  free(kernel);
}

/* A residual that nobody else reads is where the sum goes. */
static size_t sum_in_place(int **from, int **to) {
  *from = malloc(sizeof(int)), *to = malloc(sizeof(int));
  if (!*from || !*to) return 0;
  **from = 3, **to = 0;
  return 1;
}
static size_t nothing_in_place(int **from, int **to) { return *from = *to = NULL, 0; }
static void release(int *from, int *to) { free(from), free(to); }

#define OPERATOR(which, in, out, type)                                                             \
  {{.version = API_VERSION, .GetName = name, .GetExecutionProviderType = provider,                 \
    .GetInputType = input_type, .GetInputTypeCount = inputs, .GetOutputType = output_type,         \
    .GetOutputTypeCount = outputs, .KernelDestroy = destroy, .GetInputCharacteristic = input_kind, \
    .GetOutputCharacteristic = output_kind, .GetInputMemoryType = memory,                          \
    .CreateKernelV2 = create, .KernelComputeV2 = compute, .GetStartVersion = version,              \
    .GetEndVersion = version,                                                                      \
    .GetMayInplace = which == LINEAR ? sum_in_place : nothing_in_place,                            \
    .ReleaseMayInplace = release, .GetAliasMap = nothing_in_place, .ReleaseAliasMap = release},    \
   which, in, out, type}
#define OPERATORS(type)                                                            \
  {OPERATOR(LINEAR, 5, 1, type), OPERATOR(ROTATE, 4, 1, type),                     \
   OPERATOR(ROTATE_APPEND, 6, 3, type), OPERATOR(ATTENTION, 4, 1, type)}
static const Operator half[KINDS] = OPERATORS(ELEMENT_FLOAT16);
static const Operator brain[KINDS] = OPERATORS(ELEMENT_BFLOAT16);

static OrtStatus *add(const OrtApi *api, OrtOptions *options, const char *domain,
                      const Operator *operators) {
  OrtDomain *made;
  TRY(api->CreateCustomOpDomain(domain, &made));
  for (int i = 0; i < KINDS; i++) TRY(api->CustomOpDomain_Add(made, &operators[i].op));
  return api->AddCustomOpDomain(options, made);
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtOptions *options,
                                                                     const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(API_VERSION);
  if (!api) return NULL; /* older than 1.18: the session then says which operator it misses */
  TRY(add(api, options, "cla.float16", half));
  return add(api, options, "cla.bfloat16", brain);
}

/* The part of ONNX Runtime's C interface that a custom operator needs.
 *
 * ONNX Runtime's wheels ship no headers. Its interface is a table of functions that only ever grows
 * at the end, and a struct that describes an operator, read up to the version it claims; so the few
 * entries used here are declared by their place in the table. `API_VERSION` is the oldest version
 * that has them all (GetMayInplace came with ONNX Runtime 1.18).
 */

#ifndef CLA_EXPORT_ONNXRUNTIME_ABI_H
#define CLA_EXPORT_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { API_VERSION = 18 };
enum { ELEMENT_ANY = 0, ELEMENT_FLOAT = 1, ELEMENT_INT8 = 3, ELEMENT_INT32 = 6, ELEMENT_INT64 = 7, ELEMENT_FLOAT16 = 10, ELEMENT_BFLOAT16 = 16 };
enum { STATUS_FAIL = 1, STATUS_INVALID_ARGUMENT = 2 };
enum { REQUIRED = 0, OPTIONAL = 1 };
enum { MEMORY_DEFAULT = 0 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtDomain OrtDomain;
typedef struct OrtOptions OrtOptions;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtContext OrtContext;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct OrtApi {
  OrtStatus *(*CreateStatus)(int code, const char *message); /* 0 */
  void *skip_1[25];
  OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtDomain **out);         /* 26 */
  OrtStatus *(*CustomOpDomain_Add)(OrtDomain *domain, const OrtCustomOp *op);    /* 27 */
  OrtStatus *(*AddCustomOpDomain)(OrtOptions *options, OrtDomain *domain);       /* 28 */
  void *skip_29[22];
  OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out); /* 51 */
  void *skip_52[9];
  OrtStatus *(*GetDimensionsCount)(const OrtTensorInfo *info, size_t *out);              /* 61 */
  OrtStatus *(*GetDimensions)(const OrtTensorInfo *info, int64_t *dims, size_t count);   /* 62 */
  void *skip_63[2];
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorInfo **out); /* 65 */
  void *skip_66[19];
  OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name,
                                             float *out); /* 85 */
  OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name,
                                             int64_t *out); /* 86 */
  void *skip_87[3];
  OrtStatus *(*KernelContext_GetInput)(const OrtContext *context, size_t index,
                                       const OrtValue **out); /* 90 */
  OrtStatus *(*KernelContext_GetOutput)(OrtContext *context, size_t index, const int64_t *dims,
                                        size_t count, OrtValue **out); /* 91 */
  void *skip_92[1];
  void (*ReleaseStatus)(OrtStatus *status); /* 93 */
  void *skip_94[5];
  void (*ReleaseTensorInfo)(OrtTensorInfo *info); /* 99 */
  void *skip_100[93];
  OrtStatus *(*KernelContext_GetGPUComputeStream)(const OrtContext *context,
                                                  void **out); /* 193 */
  void *skip_194[80];
  OrtStatus *(*KernelContext_ParallelFor)(const OrtContext *context, void (*task)(void *, size_t),
                                          size_t tasks, size_t batches, void *data); /* 274 */
} OrtApi;

_Static_assert(offsetof(OrtApi, AddCustomOpDomain) == 28 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, KernelContext_GetOutput) == 91 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, ReleaseTensorInfo) == 99 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, KernelContext_GetGPUComputeStream) == 193 * sizeof(void *), "table");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "table");

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
  const char *(*GetName)(const OrtCustomOp *op);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
  int (*GetInputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *op);
  int (*GetOutputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
  void (*KernelCompute)(void *kernel, OrtContext *context);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                               void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtContext *context);
  OrtStatus *(*InferOutputShape)(const OrtCustomOp *op, void *context);
  int (*GetStartVersion)(const OrtCustomOp *op);
  int (*GetEndVersion)(const OrtCustomOp *op);
  size_t (*GetMayInplace)(int **inputs, int **outputs);
  void (*ReleaseMayInplace)(int *inputs, int *outputs);
  size_t (*GetAliasMap)(int **inputs, int **outputs);
  void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

#endif

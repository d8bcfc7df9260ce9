/* What the host did for a node is noted, and done again without asking it.
 *
 * A note holds the launches of a call by its shapes, and by which of its tensors are the same memory
 * or missing. In their arguments, a tensor's address is named by its number, so the next call of
 * that kind, whose tensors lie elsewhere, is served by the note. Everything else stays as it was:
 * work space is never given back.
 */

enum { MAX_WORDS = 24, MAX_NOTES = 128, MAX_TENSORS = MAX_INPUTS + MAX_OUTPUTS };
enum { RUN_KERNEL, COPY_BYTES, MULTIPLY };
enum { CLUSTER_DIMENSION = 4, OVERLAP_ALLOWED = 6 }; /* CUlaunchAttributeID */

typedef struct {
  int64_t tensor; /* whose address it is: an input's number, or behind those an output's; -1: none's */
  uint64_t value; /* then this */
} Word;

typedef struct {
  int64_t what;
  void *function; /* a kernel; of a product, cuBLAS's handle */
  uint32_t grid[3], threads, shared_bytes, cluster, overlap, count;
  Word words[MAX_WORDS]; /* a kernel's arguments; to, from, bytes; x, w, y, tokens, n, k, type, add */
} Launch;

typedef struct {
  int64_t rank[MAX_INPUTS];
  int64_t dims[MAX_INPUTS][MAX_RANK];
  int64_t same[MAX_TENSORS]; /* the first tensor that lies where this one does; -1: it is missing */
} Shape;

typedef struct {
  Shape shape;
  int64_t count;
  Launch *launches;
} Note;

struct Notes {
  int64_t count, next;
  Note notes[MAX_NOTES];
};

/* CUlaunchConfig and CUlaunchAttribute of cuda.h */
typedef struct {
  int32_t id, unused;
  union {
    char bytes[64];
    uint32_t cluster[3];
    int32_t allowed;
  } value;
} Attribute;

typedef struct {
  uint32_t grid[3], block[3], shared_bytes;
  void *stream;
  Attribute *attributes;
  uint32_t count;
} Config;

static struct {
  int (*launch)(const Config *, void *kernel, void **arguments, void **extra); /* cuLaunchKernelEx */
  int (*copy)(uint64_t to, uint64_t from, size_t bytes, void *stream); /* cuMemcpyDtoDAsync */
  int (*multiply)(void *handle, int, int, int m, int n, int k, const void *alpha, const void *a, int,
                  int, const void *b, int, int, const void *beta, void *c, int, int, int, int);
} driver; /* multiply: cublasGemmEx */

__attribute__((visibility("default"))) void cla_set_driver(void *launch, void *copy, void *multiply) {
  driver.launch = launch, driver.copy = copy, driver.multiply = multiply;
}

static const void *address(const HostCall *call, int64_t tensor) {
  return tensor < MAX_INPUTS ? call->inputs[tensor].data : call->outputs[tensor - MAX_INPUTS].data;
}

static void shape_of(const HostCall *call, Shape *shape) {
  memset(shape, 0, sizeof *shape);
  for (int i = 0; i < MAX_INPUTS; i++) {
    shape->rank[i] = call->inputs[i].rank;
    memcpy(shape->dims[i], call->inputs[i].dims, sizeof shape->dims[i]);
  }
  for (int i = 0; i < MAX_TENSORS; i++) {
    shape->same[i] = address(call, i) ? 0 : -1;
    while (shape->same[i] >= 0 && address(call, shape->same[i]) != address(call, i)) shape->same[i]++;
  }
}

/* Note the launches of a call, which were done; of too many notes the oldest is given up. */
__attribute__((visibility("default"))) int cla_note(const HostCall *call, const Launch *launches,
                                                     int64_t count) {
  if (!*call->notes) *call->notes = calloc(1, sizeof **call->notes);
  Launch *copy = malloc((size_t)count * sizeof *copy);
  struct Notes *all = *call->notes;
  if (!all || (count && !copy)) return free(copy), 1;
  memcpy(copy, launches, (size_t)count * sizeof *copy);
  Note *note = &all->notes[all->next];
  free(note->launches);
  shape_of(call, &note->shape);
  note->count = count, note->launches = copy;
  all->next = (all->next + 1) % MAX_NOTES;
  if (all->count < MAX_NOTES) all->count++;
  return 0;
}

static void forget(struct Notes *all) {
  for (int64_t i = 0; all && i < all->count; i++) free(all->notes[i].launches);
  free(all);
}

static const Note *find(const HostCall *call) {
  const struct Notes *all = *call->notes;
  if (!all || !all->count) return NULL;
  Shape shape;
  shape_of(call, &shape);
  for (int64_t i = 0; i < all->count; i++)
    if (!memcmp(&all->notes[i].shape, &shape, sizeof shape)) return &all->notes[i];
  return NULL;
}

static int run_kernel(const Launch *launch, uint64_t *values, void *stream) {
  void *arguments[MAX_WORDS];
  for (uint32_t i = 0; i < launch->count; i++) arguments[i] = &values[i];
  Attribute attributes[2] = {{0}};
  Config config = {.block = {launch->threads, 1, 1}, .shared_bytes = launch->shared_bytes,
                   .stream = stream, .attributes = attributes};
  memcpy(config.grid, launch->grid, sizeof config.grid);
  if (launch->cluster > 1) {
    Attribute *cluster = &attributes[config.count++];
    cluster->id = CLUSTER_DIMENSION;
    cluster->value.cluster[0] = launch->cluster;
    cluster->value.cluster[1] = cluster->value.cluster[2] = 1;
  }
  if (launch->overlap) {
    attributes[config.count].id = OVERLAP_ALLOWED;
    attributes[config.count++].value.allowed = 1;
  }
  return driver.launch(&config, launch->function, arguments, NULL);
}

static int multiply(const Launch *launch, const uint64_t *v) {
  enum { TRANSPOSED = 1, PLAIN = 0, FLOAT32 = 68, DEFAULT = -1 };
  int tokens = (int)v[3], n = (int)v[4], k = (int)v[5], type = (int)v[6];
  const float one = 1, beta = v[7] ? 1 : 0;
  return driver.multiply(launch->function, TRANSPOSED, PLAIN, n, tokens, k, &one, (void *)v[1], type,
                         k, (void *)v[0], type, k, &beta, (void *)v[2], type, n, FLOAT32, DEFAULT);
}

static int replay(const Note *note, const HostCall *call) {
  for (int64_t i = 0; i < note->count; i++) {
    const Launch *launch = &note->launches[i];
    uint64_t v[MAX_WORDS];
    for (uint32_t j = 0; j < launch->count; j++) {
      const Word *word = &launch->words[j];
      v[j] = word->tensor < 0 ? word->value : (uint64_t)address(call, word->tensor);
    }
    int status = launch->what == RUN_KERNEL   ? run_kernel(launch, v, call->stream)
                 : launch->what == COPY_BYTES ? driver.copy(v[0], v[1], v[2], call->stream)
                                              : multiply(launch, v);
    if (status) return status;
  }
  return 0;
}

/* Do a call's work, by a note or by asking; 0: it is queued. */
__attribute__((visibility("default"))) int cla_run(const HostCall *call) {
  const Note *note = find(call);
  if (note) return replay(note, call);
  return callback ? callback(call) : 1;
}

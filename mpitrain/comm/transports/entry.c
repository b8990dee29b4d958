/* The short way of a collective, from the interpreter straight to what performs it: the loops of kernel.c, or the
 * functions of the MPI library.
 *
 * Optional, and the same as mpitrain/comm/direct.py does: a call on contiguous NumPy arrays is checked, counted and
 * performed here; whatever is not as plain as that is left to Python, with nothing done.  It knows loops and library by
 * addresses only, so that it is built without either.  Written for the stable interface of CPython, so that one build
 * serves all its versions.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { ABI = 4, DONE = 0, FORMATS = 128 }; /* ABI: as entry.py calls this; DONE: as kernel.c says it */

typedef int begin(void *job, void *operation, const char *from, char *into, int64_t nbytes, int64_t past_cache,
                  int64_t kind, int64_t block, int64_t offset);

/* A handle of the MPI library's: a pointer with some, an int with others, which comes in the same register. */
typedef uintptr_t handle;
typedef int mpi_allreduce(const void *, void *, int, handle datatype, handle op, handle comm);
typedef int mpi_broadcast(void *, int, handle datatype, int root, handle comm);
typedef int mpi_reduce_scatter(const void *, void *, int, handle datatype, handle op, handle comm);
typedef int mpi_allgather(const void *, int, handle, void *, int, handle, handle comm);

typedef struct { /* memory in which arrays are reduced where they lie */
  int64_t start, stop, block;
} part;

typedef struct { /* how elements of one format travel, and what reduces them; 0: nothing does */
  int64_t item_bytes;
  int64_t operation, kind; /* of the loops */
  handle datatype, op;     /* of the library */
  int64_t divisor;         /* of what these return, for a mean; 0: none */
} way;

typedef struct { /* nothing here is a reference to an object */
  begin *loops;    /* NULL: there are none */
  void *job;
  int64_t past_cache_from_bytes, located_from_bytes;
  mpi_allreduce *allreduce;
  mpi_broadcast *broadcast;
  mpi_reduce_scatter *reduce_scatter;
  mpi_allgather *allgather;
  handle comm;
  void *in_place;
  int64_t rank, ranks;
  int64_t most_elements;       /* of what the library moves at once */
  int64_t library_below_bytes; /* a smaller array is reduced by the library, where there are no loops */
} places;

enum called { ALLREDUCE, BROADCAST, REDUCE_SCATTER, ALLGATHER, PLANNED, CALLED }; /* PLANNED: an allreduce */
static const char *const NAMES[CALLED] = {"allreduce", "broadcast", "reduce_scatter", "allgather", "allreduce_plan"};

typedef struct {
  PyObject_HEAD
  places at;
  PyObject *ways;  /* from the name of a reduction to bytes: a way for each format of one character; None: no reduction */
  PyObject *array; /* the type of NumPy's arrays */
  PyObject *empty; /* from a shape and a dtype to an array */
  PyObject *complete; /* called with (into, op, said) where other ranks are not there yet, or came otherwise */
  PyObject *failed;   /* called with (operation, array, code), raises */
  PyObject *held;     /* bytes: parts */
  Py_buffer tallies[CALLED]; /* of each: how often, and bytes */
  int freed;          /* the communicator is */
  int64_t returned;   /* calls of the library that have */
  const char *calling; /* the one that has not; NULL: none */
  PyObject *calling_array, *calling_detail; /* its array, and reduction or root: borrowed */
} Entry;

/* ---- What a call is about */

static int reduces(enum called which) { return which != BROADCAST && which != ALLGATHER; }

static int keeps_shape(enum called which) { return which != REDUCE_SCATTER && which != ALLGATHER; }

static const way *find_way(const Entry *self, enum called which, PyObject *op, const Py_buffer *view) {
  const char *format = view->format; /* of chars, whose sign is the machine's to choose */
  if (!format || (unsigned char)format[0] >= FORMATS || format[1] || (reduces(which) && !PyUnicode_CheckExact(op))) return NULL;
  PyObject *table = PyDict_GetItemWithError(self->ways, reduces(which) ? op : Py_None); /* borrowed */
  if (!table) return NULL;
  const way *found = (const way *)PyBytes_AsString(table) + format[0];
  return found->item_bytes == view->itemsize ? found : NULL;
}

/* Return the memory that an array lies in, if it is to be reduced there. */
static const part *find_part(const Entry *self, const Py_buffer *view) {
  const part *parts = (const part *)PyBytes_AsString(self->held);
  const int64_t address = (int64_t)(uintptr_t)view->buf;
  const Py_ssize_t count = PyBytes_Size(self->held) / (Py_ssize_t)sizeof *parts;
  for (const part *each = parts; each < parts + count; each++)
    if (each->start <= address && address + view->len <= each->stop) return each;
  return NULL;
}

/* Tell whether an array can be taken at once: by the loops, or by the library where it would come to that. */
static int is_served(const Entry *self, enum called which, const way *found, const Py_buffer *from) {
  if (which == ALLREDUCE && self->at.loops) return found->operation != 0;
  const int64_t elements = from->len / from->itemsize;
  if (!found->datatype || elements > self->at.most_elements) return 0;
  if (which == ALLGATHER) return elements <= self->at.most_elements / self->at.ranks;
  return which != ALLREDUCE || from->len < self->at.library_below_bytes;
}

/* The root as Python gave it; -1 if that is not plain. */
static int64_t root_of(const Entry *self, PyObject *detail) {
  if (!PyLong_CheckExact(detail)) return -1;
  int overflow;
  const long long root = PyLong_AsLongLongAndOverflow(detail, &overflow);
  return overflow || root < 0 || root >= self->at.ranks ? -1 : root;
}

enum { MOST_DIMENSIONS = 64 };

typedef struct {
  int count;
  Py_ssize_t sizes[MOST_DIMENSIONS + 1];
} dimensions;

/* The shape of a result; count -1: there is none. */
static dimensions shape_of(const Entry *self, enum called which, const Py_buffer *from) {
  dimensions found = {from->ndim, {0}};
  const int dropped = which == REDUCE_SCATTER, added = which == ALLGATHER;
  if (from->ndim > MOST_DIMENSIONS || (dropped && (!from->ndim || from->shape[0] != self->at.ranks)))
    return (dimensions){-1, {0}};
  found.count += added - dropped;
  if (added) found.sizes[0] = self->at.ranks;
  for (int i = added; i < found.count; i++) found.sizes[i] = from->shape[i - added + dropped];
  return found;
}

static PyObject *new_array(const Entry *self, PyObject *like, const dimensions *shape) {
  PyObject *dtype = PyObject_GetAttrString(like, "dtype"), *sizes = PyTuple_New(shape->count), *made = NULL;
  for (int i = 0; sizes && i < shape->count; i++) {
    PyObject *size = PyLong_FromSsize_t(shape->sizes[i]);
    if (!size) Py_CLEAR(sizes);
    else PyTuple_SetItem(sizes, i, size);
  }
  if (dtype && sizes) made = PyObject_CallFunctionObjArgs(self->empty, sizes, dtype, NULL);
  Py_XDECREF(dtype);
  Py_XDECREF(sizes);
  return made;
}

static int is_aligned(const Py_buffer *view) { return (uintptr_t)view->buf % (uintptr_t)view->itemsize == 0; }

/* Tell whether out can take a result; the shape of a 0-d array is NULL, which memcmp must not see. */
static int fits(const Py_buffer *out, const Py_buffer *x, const dimensions *shape) {
  const char *a = out->buf, *b = x->buf;
  return out->ndim == shape->count && !strcmp(out->format, x->format) && is_aligned(out) &&
         (!shape->count || !memcmp(out->shape, shape->sizes, shape->count * sizeof *out->shape)) &&
         (a + out->len <= b || b + x->len <= a);
}

/* Get a contiguous NumPy array's memory. */
static int get(const Entry *self, PyObject *array, int writable, Py_buffer *view) {
  if ((PyObject *)Py_TYPE(array) != self->array) return 0;
  if (PyObject_GetBuffer(array, view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) == 0) return 1;
  PyErr_Clear(); /* not contiguous, or read-only: Python says so */
  return 0;
}

/* ---- Performing it */

static void divide(const Py_buffer *values, int64_t divisor) {
  const Py_ssize_t n = values->len / values->itemsize;
  if (values->itemsize == sizeof(float))
    for (Py_ssize_t i = 0; i < n; i++) ((float *)values->buf)[i] /= (float)divisor;
  else
    for (Py_ssize_t i = 0; i < n; i++) ((double *)values->buf)[i] /= (double)divisor;
}

static PyObject *by_loops(Entry *self, PyObject *op, const way *found, const Py_buffer *from, const Py_buffer *to,
                          PyObject *into) {
  const places *at = &self->at;
  const int in_place = from->buf == to->buf, past_cache = !in_place && to->len >= at->past_cache_from_bytes;
  const part *lies = in_place && to->len >= at->located_from_bytes ? find_part(self, to) : NULL;
  const int64_t block = lies ? lies->block : -1, offset = lies ? (int64_t)(uintptr_t)to->buf - lies->start : -1;
  const int said = at->loops(at->job, (void *)(uintptr_t)found->operation, from->buf, to->buf, to->len, past_cache,
                             found->kind, block, offset);
  if (said == DONE) {
    if (found->divisor) divide(to, found->divisor);
    return Py_NewRef(into);
  }
  PyObject *number = PyLong_FromLong(said);
  if (!number) return NULL;
  PyObject *result = PyObject_CallFunctionObjArgs(self->complete, into, op, number, NULL);
  Py_DECREF(number);
  return result;
}

static int call_library(const places *at, enum called which, const way *found, const Py_buffer *from,
                        const Py_buffer *to, int root) {
  const int taken = (int)(from->len / from->itemsize), given = (int)(to->len / to->itemsize);
  switch (which) {
    case BROADCAST:
      return at->broadcast(to->buf, given, found->datatype, root, at->comm);
    case REDUCE_SCATTER:
      return at->reduce_scatter(from->buf, to->buf, given, found->datatype, found->op, at->comm);
    case ALLGATHER:
      return at->allgather(from->buf, taken, found->datatype, to->buf, taken, found->datatype, at->comm);
    default:
      return at->allreduce(from->buf == to->buf ? at->in_place : from->buf, to->buf, given, found->datatype, found->op,
                           at->comm);
  }
}

static PyObject *fail(Entry *self, enum called which, PyObject *array, int code) {
  PyObject *returned = PyObject_CallFunction(self->failed, "sOi", NAMES[which], array, code);
  Py_XDECREF(returned); /* NULL: it raises */
  return NULL;
}

static PyObject *by_library(Entry *self, enum called which, PyObject *detail, const way *found, const Py_buffer *from,
                            const Py_buffer *to, PyObject *into) {
  const int root = which == BROADCAST ? (int)root_of(self, detail) : -1;
  if (root == self->at.rank && from->buf != to->buf) memcpy(to->buf, from->buf, to->len);
  if (self->freed) return fail(self, which, into, 0);
  int code;
  self->calling = NAMES[which], self->calling_array = into, self->calling_detail = detail; /* for who looks meanwhile */
  Py_BEGIN_ALLOW_THREADS
  code = call_library(&self->at, which, found, from, to, root);
  Py_END_ALLOW_THREADS
  self->calling = NULL;
  self->returned++;
  if (code) return fail(self, which, into, code);
  if (found->divisor) divide(to, found->divisor);
  return Py_NewRef(into);
}

static PyObject *perform(Entry *self, enum called which, PyObject *detail, const way *found, const Py_buffer *from,
                         const Py_buffer *to, PyObject *into) {
  int64_t *tally = self->tallies[which].buf;
  tally[0] += 1;
  tally[1] += from->len > to->len ? from->len : to->len;
  if (which == ALLREDUCE && self->at.loops) return by_loops(self, detail, found, from, to, into);
  return by_library(self, which, detail, found, from, to, into);
}

/* Take x into out, which may be None for a new array; None where that takes more than this. */
static PyObject *run(Entry *self, enum called which, PyObject *x, PyObject *detail, PyObject *out) {
  Py_buffer from, to;
  PyObject *result = NULL;
  const int in_place = out == x && keeps_shape(which);
  if (which == BROADCAST && root_of(self, detail) < 0) return Py_NewRef(Py_None);
  if (!get(self, x, in_place, &from)) return Py_NewRef(Py_None);
  const way *found = find_way(self, which, detail, &from);
  const dimensions shape = shape_of(self, which, &from);
  if (!found || shape.count < 0 || !is_aligned(&from) || !is_served(self, which, found, &from)) {
    result = PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
  } else if (in_place) {
    result = perform(self, which, detail, found, &from, &from, x);
  } else {
    PyObject *into = out == Py_None ? new_array(self, x, &shape) : Py_NewRef(out);
    if (into && get(self, into, 1, &to)) {
      const int ready = fits(&to, &from, &shape);
      result = ready ? perform(self, which, detail, found, &from, &to, into) : Py_NewRef(Py_None);
      PyBuffer_Release(&to);
    } else if (into) {
      result = Py_NewRef(Py_None);
    }
    Py_XDECREF(into);
  }
  PyBuffer_Release(&from);
  return result;
}

/* ---- What Python calls */

static PyObject *run3(PyObject *self, enum called which, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "%s takes 3 arguments, got %zd", NAMES[which], count);
  return run((Entry *)self, which, arguments[0], arguments[1], arguments[2]);
}

static PyObject *Entry_allreduce(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  return run3(self, ALLREDUCE, arguments, count);
}

static PyObject *Entry_planned(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  PyObject *result = run3(self, PLANNED, arguments, count);
  if (result != Py_None) return result;
  Py_DECREF(result);
  return PyErr_Format(PyExc_RuntimeError, "the arrays of a plan are not what they were");
}

static PyObject *Entry_broadcast(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  return run3(self, BROADCAST, arguments, count);
}

static PyObject *Entry_reduce_scatter(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  return run3(self, REDUCE_SCATTER, arguments, count);
}

static PyObject *Entry_allgather(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "allgather takes 2 arguments, got %zd", count);
  return run((Entry *)self, ALLGATHER, arguments[0], Py_None, arguments[1]);
}

static PyObject *Entry_hold(PyObject *self, PyObject *parts) {
  if (!PyBytes_Check(parts)) return PyErr_Format(PyExc_TypeError, "hold takes bytes");
  PyObject *before = ((Entry *)self)->held;
  ((Entry *)self)->held = Py_NewRef(parts);
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

static PyObject *Entry_close(PyObject *self, PyObject *unused) {
  (void)unused;
  ((Entry *)self)->freed = 1;
  Py_RETURN_NONE;
}

static PyObject *Entry_calling(PyObject *object, PyObject *unused) {
  const Entry *self = (Entry *)object;
  (void)unused;
  if (!self->calling) Py_RETURN_NONE;
  return Py_BuildValue("sOOL", self->calling, self->calling_array, self->calling_detail, (long long)self->returned);
}

static PyObject *Entry_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
  const char *at;
  Py_ssize_t at_bytes;
  PyObject *ways, *array, *empty, *complete, *failed, *tallies;
  (void)named;
  if (!PyArg_ParseTuple(arguments, "y#O!OOOOO!", &at, &at_bytes, &PyDict_Type, &ways, &array, &empty, &complete, &failed,
                        &PyTuple_Type, &tallies))
    return NULL;
  if (at_bytes != sizeof(places) || PyTuple_Size(tallies) != CALLED)
    return PyErr_Format(PyExc_TypeError, "Entry is of another version");
  Entry *self = (Entry *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (!self) return NULL;
  memcpy(&self->at, at, sizeof(places));
  self->ways = Py_NewRef(ways);
  self->array = Py_NewRef(array);
  self->empty = Py_NewRef(empty);
  self->complete = Py_NewRef(complete);
  self->failed = Py_NewRef(failed);
  self->held = PyBytes_FromStringAndSize(NULL, 0);
  int ready = self->held != NULL;
  for (int i = 0; ready && i < CALLED; i++)
    ready = !PyObject_GetBuffer(PyTuple_GetItem(tallies, i), &self->tallies[i], PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE);
  if (!ready) {
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

static int Entry_traverse(PyObject *object, visitproc visit, void *arg) {
  Entry *self = (Entry *)object;
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->ways);
  Py_VISIT(self->complete);
  Py_VISIT(self->failed);
  return 0;
}

static int Entry_clear(PyObject *object) {
  Entry *self = (Entry *)object;
  Py_CLEAR(self->ways);
  Py_CLEAR(self->complete);
  Py_CLEAR(self->failed);
  return 0;
}

static void Entry_dealloc(PyObject *object) {
  Entry *self = (Entry *)object;
  PyTypeObject *type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  Entry_clear(object);
  Py_CLEAR(self->array);
  Py_CLEAR(self->empty);
  Py_CLEAR(self->held);
  for (int i = 0; i < CALLED; i++)
    if (self->tallies[i].obj) PyBuffer_Release(&self->tallies[i]);
  ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

#define FAST(NAME) (PyCFunction)(void (*)(void))NAME, METH_FASTCALL

static PyMethodDef METHODS[] = {
    {"allreduce", FAST(Entry_allreduce), "Reduce x by op into out; None if not plain."},
    {"planned", FAST(Entry_planned), "Reduce x by op into out, by the library, without counting it."},
    {"broadcast", FAST(Entry_broadcast), "Give x of the root to out; None if not plain."},
    {"reduce_scatter", FAST(Entry_reduce_scatter), "Reduce x by op, a row of it into out; None if not plain."},
    {"allgather", FAST(Entry_allgather), "Collect x of all into out; None if not plain."},
    {"hold", Entry_hold, METH_O, "Say in which parts of memory arrays are reduced where they lie."},
    {"close", Entry_close, METH_NOARGS, "Call the library no more."},
    {"calling", Entry_calling, METH_NOARGS, "Tell what has been asked of the library, and how much it has answered."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_new, Entry_new},           {Py_tp_methods, METHODS},          {Py_tp_traverse, Entry_traverse},
    {Py_tp_clear, Entry_clear},       {Py_tp_dealloc, Entry_dealloc},   {0, NULL},
};

static PyType_Spec SPEC = {
    "mpitrain.comm.transports._entry.Entry", sizeof(Entry), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, SLOTS,
};

static int fill(PyObject *module) {
  PyObject *type = PyType_FromSpec(&SPEC);
  const int failed = !type || PyModule_AddObjectRef(module, "Entry", type);
  Py_XDECREF(type);
  return failed ? -1 : PyModule_AddIntConstant(module, "ABI", ABI);
}

static PyModuleDef_Slot MODULE_SLOTS[] = {{Py_mod_exec, fill}, {0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_entry", "The short way of plain collectives.", 0, NULL, MODULE_SLOTS, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__entry(void) { return PyModuleDef_Init(&MODULE); }

/* The short way of an allreduce over shared memory, from the interpreter straight into the loops of kernel.c.
 *
 * Optional, and the same as mpitrain/comm/direct.py does: a call on contiguous NumPy arrays is checked, counted and
 * performed here; whatever is not as plain as that is left to Python, with nothing done.  It knows the loops by their
 * address only.  Written for the stable interface of CPython, so that one build serves all its versions.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { ABI = 3, DONE = 0 }; /* as in kernel.c */

typedef int begin(void *job, void *operation, const char *from, char *into, int64_t nbytes, int64_t past_cache,
                  int64_t kind, int64_t block, int64_t offset);

typedef struct { /* memory in which arrays are reduced where they lie */
  int64_t start, stop, block;
} part;

typedef struct { /* what reduces elements of one format; operation 0: nothing does */
  int64_t operation, kind, item_bytes;
  int64_t divisor; /* of what the loops return, for a mean; 0: none */
} way;

typedef struct {
  PyObject_HEAD
  begin *allreduce;
  void *job;
  int64_t past_cache_from_bytes, located_from_bytes;
  PyObject *ways;  /* from the name of a reduction to bytes: a way for each format of one character */
  PyObject *array; /* the type of NumPy's arrays */
  PyObject *empty_like;
  PyObject *complete; /* called with (into, op, said) where the others are not there yet, or came otherwise */
  PyObject *held;  /* bytes: parts */
  Py_buffer tally; /* two numbers: calls, and their bytes */
} Entry;

static const way *find_way(const Entry *self, PyObject *op, const Py_buffer *view) {
  const char *format = view->format;
  if (!PyUnicode_CheckExact(op) || !format || format[0] < 0 || format[1]) return NULL;
  PyObject *table = PyDict_GetItemWithError(self->ways, op); /* borrowed */
  if (!table) return NULL;
  const way *found = (const way *)PyBytes_AsString(table) + format[0];
  return found->operation && found->item_bytes == view->itemsize ? found : NULL;
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

static int fits(const Py_buffer *out, const Py_buffer *x) {
  const char *a = out->buf, *b = x->buf;
  return out->ndim == x->ndim && !strcmp(out->format, x->format) &&
         !memcmp(out->shape, x->shape, x->ndim * sizeof *x->shape) && (a + out->len <= b || b + x->len <= a);
}

static int is_aligned(const Py_buffer *view) { return (uintptr_t)view->buf % (uintptr_t)view->itemsize == 0; }

/* Get a contiguous NumPy array's memory. */
static int get(const Entry *self, PyObject *array, int flags, Py_buffer *view) {
  if ((PyObject *)Py_TYPE(array) != self->array) return 0;
  if (PyObject_GetBuffer(array, view, flags) == 0) return 1;
  PyErr_Clear(); /* not contiguous, or read-only: Python says so */
  return 0;
}

static void divide(const Py_buffer *values, int64_t divisor) {
  const Py_ssize_t n = values->len / values->itemsize;
  if (values->itemsize == sizeof(float))
    for (Py_ssize_t i = 0; i < n; i++) ((float *)values->buf)[i] /= (float)divisor;
  else
    for (Py_ssize_t i = 0; i < n; i++) ((double *)values->buf)[i] /= (double)divisor;
}

static PyObject *perform(Entry *self, PyObject *op, const way *found, const Py_buffer *from, const Py_buffer *to,
                         PyObject *into) {
  int64_t *tally = self->tally.buf;
  tally[0] += 1;
  tally[1] += to->len;
  const int in_place = from->buf == to->buf, past_cache = !in_place && to->len >= self->past_cache_from_bytes;
  const part *lies = in_place && to->len >= self->located_from_bytes ? find_part(self, to) : NULL;
  const int64_t block = lies ? lies->block : -1, offset = lies ? (int64_t)(uintptr_t)to->buf - lies->start : -1;
  const int said = self->allreduce(self->job, (void *)(uintptr_t)found->operation, from->buf, to->buf, to->len,
                                   past_cache, found->kind, block, offset);
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

/* Reduce x into out, which may be x, or None for a new array; None where that takes more than this. */
static PyObject *reduce(Entry *self, PyObject *x, PyObject *op, PyObject *out) {
  Py_buffer from, to;
  PyObject *result = NULL;
  if (!get(self, x, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (out == x ? PyBUF_WRITABLE : 0), &from))
    return Py_NewRef(Py_None);
  const way *found = find_way(self, op, &from);
  if (!found || !is_aligned(&from)) {
    result = PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
  } else if (out == x) {
    result = perform(self, op, found, &from, &from, x);
  } else {
    PyObject *into = out == Py_None ? PyObject_CallFunctionObjArgs(self->empty_like, x, NULL) : Py_NewRef(out);
    if (into && get(self, into, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, &to)) {
      const int ready = fits(&to, &from) && is_aligned(&to);
      result = ready ? perform(self, op, found, &from, &to, into) : Py_NewRef(Py_None);
      PyBuffer_Release(&to);
    } else if (into) {
      result = Py_NewRef(Py_None);
    }
    Py_XDECREF(into);
  }
  PyBuffer_Release(&from);
  return result;
}

static PyObject *Entry_allreduce(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "allreduce takes x, op and out, got %zd arguments", count);
  return reduce((Entry *)self, arguments[0], arguments[1], arguments[2]);
}

static PyObject *Entry_hold(PyObject *self, PyObject *parts) {
  if (!PyBytes_Check(parts)) return PyErr_Format(PyExc_TypeError, "hold takes bytes");
  PyObject *before = ((Entry *)self)->held;
  ((Entry *)self)->held = Py_NewRef(parts);
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

static PyObject *Entry_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
  unsigned long long function, job;
  long long past, located;
  PyObject *ways, *array, *empty_like, *complete, *tally;
  (void)named;
  if (!PyArg_ParseTuple(arguments, "KKLLO!OOOO", &function, &job, &past, &located, &PyDict_Type, &ways, &array,
                        &empty_like, &complete, &tally))
    return NULL;
  Entry *self = (Entry *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (!self) return NULL;
  self->allreduce = (begin *)(uintptr_t)function;
  self->job = (void *)(uintptr_t)job;
  self->past_cache_from_bytes = past;
  self->located_from_bytes = located;
  self->ways = Py_NewRef(ways);
  self->array = Py_NewRef(array);
  self->empty_like = Py_NewRef(empty_like);
  self->complete = Py_NewRef(complete);
  self->held = PyBytes_FromStringAndSize(NULL, 0);
  if (!self->held || PyObject_GetBuffer(tally, &self->tally, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
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
  return 0;
}

static int Entry_clear(PyObject *object) {
  Entry *self = (Entry *)object;
  Py_CLEAR(self->ways);
  Py_CLEAR(self->complete);
  return 0;
}

static void Entry_dealloc(PyObject *object) {
  Entry *self = (Entry *)object;
  PyTypeObject *type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  Entry_clear(object);
  Py_CLEAR(self->array);
  Py_CLEAR(self->empty_like);
  Py_CLEAR(self->held);
  if (self->tally.obj) PyBuffer_Release(&self->tally);
  ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

static PyMethodDef METHODS[] = {
    {"allreduce", (PyCFunction)(void (*)(void))Entry_allreduce, METH_FASTCALL, "Reduce x into out; None if not plain."},
    {"hold", Entry_hold, METH_O, "Say in which parts of memory arrays are reduced where they lie."},
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
  if (!type || PyModule_AddObjectRef(module, "Entry", type)) return -1;
  return PyModule_AddIntConstant(module, "ABI", ABI);
}

static PyModuleDef_Slot MODULE_SLOTS[] = {{Py_mod_exec, fill}, {0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_entry", "The short way of an allreduce over shared memory.", 0, NULL, MODULE_SLOTS,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__entry(void) { return PyModuleDef_Init(&MODULE); }

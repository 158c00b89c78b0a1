// `import globe_kernels._csrc` loads the library, which registers the operators of the other files.
#include <Python.h>

PyMODINIT_FUNC PyInit__csrc() {
    static PyModuleDef module{PyModuleDef_HEAD_INIT, "_csrc", nullptr, -1};
    return PyModule_Create(&module);
}

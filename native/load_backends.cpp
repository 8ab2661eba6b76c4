// Part of libllama in builds with several CPU variants (GGML_BACKEND_DL). llama.cpp looks for them beside the
// executable, which here is Python; this loads the best one from libllama's own folder as soon as libllama is loaded,
// so a program needs no more than LLAMA_CPP_LIB_PATH, as with a build that has one variant.

#include "ggml-backend.h"
#include "ggml.h"

#include <dlfcn.h>

#include <string>

__attribute__((constructor)) static void load_backends() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void *>(load_backends), &info) && info.dli_fname) {
        const std::string file = info.dli_fname;
        const size_t slash = file.rfind('/');
        // Nobody could set a log callback yet, and the default prints which backend was loaded.
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_load_all_from_path(slash == std::string::npos ? "." : file.substr(0, slash).c_str());
        ggml_log_set(nullptr, nullptr);
    }
}

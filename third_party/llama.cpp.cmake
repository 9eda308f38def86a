# The one file that knows how llama.cpp is fetched, configured and built.
#
#   pykvc_add_llama(PATCH...)        adds the targets llama, ggml, ... from the pinned source with these patches
#   pykvc_llama_targets(VAR)         the libraries that have to be installed
#   pykvc_server_libraries(VAR)      those that llama-server needs beyond them, where PYKVC_SERVER is on
#
# Every option of llama.cpp and ggml passes through: pip install . -C cmake.define.GGML_CUDA=ON

include_guard()
include(CheckCXXCompilerFlag)

set(PYKVC_THIRD_PARTY ${CMAKE_CURRENT_LIST_DIR})

# The tests' reference, too: code that is built otherwise rounds otherwise, and the tests compare bits.
option(PYKVC_SANITIZE "Address and undefined-behaviour sanitizers in everything (make sanitize)" OFF)
if(PYKVC_SANITIZE)
    add_compile_options(-fsanitize=address,undefined -fno-omit-frame-pointer -g1)
    add_link_options(-fsanitize=address,undefined)
endif()

# Each sub-build of a clean tree recompiles the same 200 files, so a compiler cache is worth its process. The base
# directory makes paths relative: another build directory finds the same objects, and so does another checkout with its own inside.
find_program(PYKVC_CCACHE ccache)
mark_as_advanced(PYKVC_CCACHE)
if(PYKVC_CCACHE)
    get_filename_component(base ${PYKVC_THIRD_PARTY} DIRECTORY)
    string(FIND "${CMAKE_BINARY_DIR}/" "${base}/" at)
    if(NOT at EQUAL 0)
        set(base ${CMAKE_BINARY_DIR})
    endif()
    foreach(lang C CXX CUDA)
        if(NOT DEFINED CMAKE_${lang}_COMPILER_LAUNCHER)
            set(CMAKE_${lang}_COMPILER_LAUNCHER env CCACHE_BASEDIR=${base} ${PYKVC_CCACHE})
        endif()
    endforeach()
endif()

# One wheel for every CPU of an architecture: ggml's CPU code is built once for each of its variants (libggml-cpu-haswell.so
# and so on), and the one that fits best is chosen when the library is loaded. As fast as code for this machine alone, but
# three times as long to build. The last variants need GCC 11 on x86, GCC 14 or Clang 16 on ARM.
set(default OFF)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    check_cxx_compiler_flag(-mavxvnni PYKVC_COMPILER_HAS_VARIANTS)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    check_cxx_compiler_flag(-march=armv9.2-a+sve2+sme PYKVC_COMPILER_HAS_VARIANTS)
endif()
if(PYKVC_COMPILER_HAS_VARIANTS AND NOT DEFINED GGML_NATIVE) # -DGGML_NATIVE=ON wins
    set(default ON)
endif()
option(PYKVC_PORTABLE "CPU code for every CPU of this architecture; OFF: for this machine's" ${default})
if(NOT PYKVC_PORTABLE)
    message(STATUS "PYKVC_PORTABLE is off: the libraries run on CPUs like this one")
elseif(NOT PYKVC_COMPILER_HAS_VARIANTS)
    message(FATAL_ERROR "PYKVC_PORTABLE: this compiler does not know all CPUs of ${CMAKE_SYSTEM_PROCESSOR}: "
        "use GCC 11 (x86), GCC 14 (ARM) or newer, or Clang 16, or -DPYKVC_PORTABLE=OFF for this machine alone")
endif()

# What this x86 CPU can do, as lower-case words without _ and . (avx512vnni); "" where that cannot be told.
function(pykvc_cpu_features out)
    set(text "")
    if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND EXISTS /proc/cpuinfo)
        file(STRINGS /proc/cpuinfo text REGEX "^flags" LIMIT_COUNT 1)
    elseif(APPLE)
        execute_process(COMMAND sysctl -n machdep.cpu.features machdep.cpu.leaf7_features
            OUTPUT_VARIABLE text ERROR_QUIET)
        string(REPLACE "AVX1.0" "AVX" text "${text}")
    endif()
    string(TOLOWER "${text}" text)
    string(REGEX REPLACE "[_.]" "" text "${text}")
    string(REGEX MATCHALL "[a-z0-9]+" words "${text}")
    set(${out} "${words}" PARENT_SCOPE)
endfunction()

# Chooses ggml's GGML_AVX2 and so on from what the CPU and the compiler can do. Not -march=native: on a CPU whose model
# the compiler does not know well that tunes for 256-bit vectors, and decoding 7000 deep is half as fast.
# Elsewhere (ARM) ggml's own GGML_NATIVE is right. A macro, as ggml's options read variables of its caller.
macro(pykvc_cpu_flags)
    # ggml's own threads are as fast. GNU's OpenMP hangs in a forked child, and its waiting threads take the core of a busy
    # neighbour: a prompt takes ten times as long.
    if(NOT DEFINED GGML_OPENMP)
        set(GGML_OPENMP OFF)
    endif()
    pykvc_cpu_features(_has)
    if(PYKVC_PORTABLE)
        set(GGML_NATIVE OFF)
        set(GGML_BACKEND_DL ON) # so a CUDA build runs without a driver, too: on the CPU
        set(GGML_CPU_ALL_VARIANTS ON)
    elseif(_has AND NOT DEFINED GGML_NATIVE AND NOT CMAKE_CROSSCOMPILING AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
        set(GGML_NATIVE OFF)
        foreach(_line
                # option       compiler flag   features
                "SSE42         -msse4.2        sse42"
                "AVX           -mavx           avx"
                "F16C          -mf16c          f16c"
                "FMA           -mfma           fma"
                "BMI2          -mbmi2          bmi2"
                "AVX2          -mavx2          avx2"
                "AVX_VNNI      -mavxvnni       avxvnni"
                "AVX512        -mavx512bw      avx512f avx512cd avx512vl avx512dq avx512bw"
                "AVX512_VBMI   -mavx512vbmi    avx512vbmi"
                "AVX512_VNNI   -mavx512vnni    avx512vnni"
                "AVX512_BF16   -mavx512bf16    avx512bf16"
                "AMX_TILE      -mamx-tile      amxtile"
                "AMX_INT8      -mamx-int8      amxint8")
            string(REGEX MATCHALL "[^ ]+" _words "${_line}")
            list(POP_FRONT _words _name _flag)
            if(NOT DEFINED GGML_${_name}) # -DGGML_AVX2=OFF wins
                check_cxx_compiler_flag(${_flag} PYKVC_COMPILER_HAS_${_name})
                set(GGML_${_name} ${PYKVC_COMPILER_HAS_${_name}})
                foreach(_word IN LISTS _words)
                    if(NOT _word IN_LIST _has)
                        set(GGML_${_name} OFF)
                    endif()
                endforeach()
            endif()
        endforeach()
    endif()
endmacro()

function(pykvc_add_llama)
    set(source ${CMAKE_BINARY_DIR}/llama.cpp)
    execute_process(COMMAND ${Python_EXECUTABLE} ${PYKVC_THIRD_PARTY}/fetch.py ${source} ${ARGN}
        RESULT_VARIABLE failed ERROR_VARIABLE why)
    if(failed)
        message(FATAL_ERROR "${why}")
    endif()
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
        ${ARGN} ${PYKVC_THIRD_PARTY}/fetch.py ${PYKVC_THIRD_PARTY}/llama_cpp.json)

    file(READ ${PYKVC_THIRD_PARTY}/llama_cpp.json pin)
    string(JSON commit GET "${pin}" commit)
    string(SUBSTRING ${commit} 0 7 LLAMA_BUILD_COMMIT)
    set(LLAMA_BUILD_NUMBER 0)
    # git would tell the commit of the project around the source, and each commit would rebuild what prints it
    set(ENV{GIT_CEILING_DIRECTORIES} ${CMAKE_BINARY_DIR})

    set(BUILD_SHARED_LIBS ON)  # llama-cpp-python and llama-server load the libraries of the package
    set(GGML_CCACHE OFF)       # ours is set above
    set(LLAMA_OPENSSL OFF)     # only for downloads by llama.cpp's tools
    set(GGML_RPC_RDMA OFF)     # would link what the machine that builds happens to have
    set(LLAMA_TESTS_INSTALL OFF)
    if(PYKVC_SERVER) # as a sub-project llama.cpp leaves out its tests, tools, server and app by itself
        set(LLAMA_BUILD_COMMON ON)
        set(LLAMA_BUILD_TOOLS ON) # configured; only what llama-server needs is compiled
        set(LLAMA_BUILD_SERVER ON)
        option(LLAMA_BUILD_UI "llama-server's web page, built with npm, which downloads a thousand packages" OFF)
        set(LLAMA_USE_PREBUILT_UI OFF)
        if(LLAMA_BUILD_UI)
            find_program(PYKVC_NPM npm)
            if(NOT PYKVC_NPM)
                message(FATAL_ERROR "LLAMA_BUILD_UI: the web page is built with npm, which comes with Node.js 20 or newer")
            endif()
        endif()
    endif()
    pykvc_cpu_flags()

    add_subdirectory(${source} ${CMAKE_BINARY_DIR}/llama.cpp-build EXCLUDE_FROM_ALL)

    # One file a library: no libllama.so -> .so.0 -> .so.0.5.0, which a wheel would hold three times.
    pykvc_llama_targets(targets)
    pykvc_server_libraries(more)
    foreach(target IN LISTS targets more)
        set_property(TARGET ${target} PROPERTY VERSION)
        set_property(TARGET ${target} PROPERTY SOVERSION)
    endforeach()
endfunction()

function(pykvc_llama_targets out)
    set(targets llama ggml ggml-base)
    foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS) # cached: may name what an earlier configuration had
        if(TARGET ${backend})
            list(APPEND targets ${backend})
        endif()
    endforeach()
    set(${out} ${targets} PARENT_SCOPE)
endfunction()

function(pykvc_server_libraries out)
    set(${out} "" PARENT_SCOPE)
    if(PYKVC_SERVER)
        set(${out} llama-server-impl llama-common mtmd PARENT_SCOPE)
    endif()
endfunction()

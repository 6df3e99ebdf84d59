// The names from cuBLAS, cuSPARSE and cuSOLVER that libtorch's CUDA headers put into declarations.
// Nothing here calls these libraries, so that opaque types will do.
#pragma once

struct cublasContext;
struct cusparseContext;
struct cusolverDnContext;
using cublasHandle_t = cublasContext*;
using cublasLtHandle_t = cublasContext*;
using cusparseHandle_t = cusparseContext*;
using cusolverDnHandle_t = cusolverDnContext*;
enum cublasStatus_t : int { CUBLAS_STATUS_SUCCESS = 0 };
enum cusparseStatus_t : int { CUSPARSE_STATUS_SUCCESS = 0 };
enum cusolverStatus_t : int { CUSOLVER_STATUS_SUCCESS = 0 };

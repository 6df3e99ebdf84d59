// Empty on purpose: NVIDIA's header needs one more package (nv/target), and the host code here names no
// type of it.

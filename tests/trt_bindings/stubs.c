// The public entry points of TensorRT's libraries, returning null, so that the Python bindings can be imported where
// there are no libraries. With REAL_REGISTRY the plugin registry comes from the lean runtime this file is linked with.

void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void) { return 1; }
#ifndef REAL_REGISTRY
void *getPluginRegistry(void) { return 0; }
#endif

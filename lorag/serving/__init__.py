"""Generated adapters in the engines that people run: served by name in vLLM, or one per request in one process."""

"""`llama serve`: an OpenAI-compatible service over one engine, on starlette and uvicorn (the extra `serve`)."""

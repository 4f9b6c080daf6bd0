"""The harness's own command, which knows the model `llama_runner`."""

from llama.errors import ParameterError
from llama.script import in_a_shell


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import llama.integrations.lm_eval.model  # noqa: F401  # registers it
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ParameterError(f'this needs {package}, which is not here: pip install "llama-runner[eval]"') from None
    cli_evaluate()


if __name__ == "__main__":
    with in_a_shell("lm_eval"):
        main()

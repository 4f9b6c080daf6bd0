"""Text as it is made, and what it cost.

python examples/streaming.py "Ben wanted a red kite."
"""

import fire

from llama import Llama, in_a_shell, show


def main(prompt: str = "Ben wanted a red kite.", max_gen_len: int = 40) -> None:
    """Complete a text, piece by piece; then answer a dialog, with a callback."""
    llama = Llama.build()
    for piece in llama.stream_text(prompt, temperature=0, max_gen_len=max_gen_len):
        show(piece, end="")  # leaving the loop early ends the request
    show("\n")

    dialog = [{"role": "user", "content": "What sound does a cow make?"}]
    pieces = []
    answers = llama.chat_completion([dialog], temperature=0, on_text=lambda index, text: pieces.append(text))
    answer = answers[0]
    show(f"{len(pieces)} pieces: {answer['generation']['content']}")
    show(f"{answer['prompt_tokens']} tokens in, {answer['completion_tokens']} out, {answer['finish_reason']}")


if __name__ == "__main__":
    with in_a_shell():
        fire.Fire(main)

"""Texts by which two tokenizers are told apart."""

#: What tokenizers split differently when one of them is built by the wrong rules: spaces, newlines, digits, words,
#: punctuation and scripts. None of it is a control token, and nothing is in it that tokenizers clean away in ways of
#: their own, as control characters are.
PROBE = (
    " a leading space",
    "   three of them",
    "two  and   three spaces, and one at the end ",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n    y = {'a': [1, 2]}  # end\n        z",
    "\n\n2. two\n\n  3. three",
    "Windows\r\nends lines so\r\n",
    "1234567890 3.14 1,000 2024's v2",
    "I'LL don't they've we'd HELLO World iPhone",
    "https://example.com/a_b?c=d&e=f%20#g $x^2$ \\frac{a}{b} <b>bold</b> ### Response:",
    "Zürich, naïve café, œuvre; Ελλάδα; Привет, мир",
    "中文，标点。日本語のテキスト 한국어 문장 ไทย",
    "مرحبا بالعالم नमस्ते दुनिया",
    "👩‍💻 🇫🇷 ½ ﬁ … ™ ＦＵＬＬ e\u0301 n\u0303",
    "a\u00a0b\u3000c",
)

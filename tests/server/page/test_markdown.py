"""The page's Markdown, which comes in pieces: however a text is cut, it becomes the same."""

import pytest
from playwright.sync_api import expect

# Whole, letter by letter, and by threes.
RENDER = """async ([text, size]) => {
    const { Markdown } = await import("/page/markdown.js");
    const root = document.createElement("div"), markdown = new Markdown(root);
    for (let at = 0; at < text.length; at += size) markdown.push(text.slice(at, at + size));
    markdown.end();
    root.normalize();
    return root.innerHTML.replaceAll(' tabindex="0"', "");
}"""
FENCE = "```"
CASES = {
    "plain": ("Hello, world", "<p>Hello, world</p>"),
    "paragraphs": ("One\ntwo\n\n\nthree\n", "<p>One\ntwo</p><p>three</p>"),
    "empty": ("\n\n", ""),
    "bold, italic and code": (
        "**a *b* c** and *d* and `e **f**`.",
        "<p><strong>a <em>b</em> c</strong> and <em>d</em> and <code>e **f**</code>.</p>",
    ),
    "both at once": ("***a*** *b **c***", "<p><strong><em>a</em></strong> <em>b <strong>c</strong></em></p>"),
    "marks that open nothing": ("2 * 3 ** 4 * 5 `", "<p>2 * 3 ** 4 * 5 `</p>"),
    "marks that are never closed": ("**a and *b `c", "<p>**a and *b `c</p>"),
    "code with a backtick": ("``a`b`` c", "<p><code>a`b</code> c</p>"),
    "a mark far away": ("*" + "a" * 1500 + "* b", "<p>*" + "a" * 1500 + "* b</p>"),
    "headings": ("# A\n### B c\ntext\n#no", "<h3>A</h3><h5>B c</h5><p>text\n#no</p>"),
    "rules": ("a\n\n---\nb\n***\n", "<p>a</p><hr><p>b</p><hr>"),
    "lists": (
        "- a\n- **b**\n  more\n\n1. c\n2. d\n\ntext",
        '<ul><li>a</li><li><strong>b</strong>\nmore</li></ul><ol start="1"><li>c</li><li>d</li></ol><p>text</p>',
    ),
    "nested lists": (
        "3. a\n   - b\n     - c\n   - d\n4. e",
        '<ol start="3"><li>a<ul><li>b<ul><li>c</li></ul></li><li>d</li></ul></li><li>e</li></ol>',
    ),
    "a paragraph in a list": ("- a\n\n  b\n- c", "<ul><li>a<p>b</p></li><li>c</li></ul>"),
    "numbers that are none": ("1986 was\n3.5 too", "<p>1986 was\n3.5 too</p>"),
    "code": (
        f"a\n{FENCE}python\nif x:\n\n    # **y**\n- 1\n{FENCE}\nb",
        '<p>a</p><pre data-language="python"><code>if x:\n\n    # **y**\n- 1</code></pre><p>b</p>',
    ),
    "code in a list": (
        f"1. a\n   {FENCE}\n   x\n     y\n   {FENCE}\n2. b",
        '<ol start="1"><li>a<pre><code>x\n  y</code></pre></li><li>b</li></ol>',
    ),
    "code with a fence": (f"`{FENCE}\n{FENCE}\nx\n`{FENCE}", f"<pre><code>{FENCE}\nx</code></pre>"),
    "code without an end": (f"{FENCE}\nx\n", "<pre><code>x</code></pre>"),
    "code in a line": (f"{FENCE}x{FENCE} y", "<p><code>x</code> y</p>"),
    "markup": (
        "<b>a</b> `<i>` &amp;",
        "<p>&lt;b&gt;a&lt;/b&gt; <code>&lt;i&gt;</code> &amp;amp;</p>",
    ),
    "letters of two halves": ("a \N{FIRE} **\N{FIRE}**", "<p>a \N{FIRE} <strong>\N{FIRE}</strong></p>"),
}


@pytest.fixture(scope="module")
def opened(browser, _playing):
    with browser.new_page() as page:
        page.goto(_playing.url)
        expect(page).not_to_have_title("Chat")
        yield page


@pytest.mark.parametrize("text, expected", CASES.values(), ids=CASES)
def test_markdown(opened, text, expected):
    for size in (len(text), 1, 3):
        assert opened.evaluate(RENDER, [text, size]) == expected, size

"""The JavaScript that harness.py runs in the page."""

from __future__ import annotations

READY = """async () => {
    const context = window.jupyterapp.shell.currentWidget.context;
    await context.ready; await context.sessionContext.ready; await context.sessionContext.session.kernel.info;
    window.kernelErrors = [];
    context.sessionContext.session.kernel.iopubMessage.connect((_, message) => {
        if (message.header.msg_type === "error")
            window.kernelErrors.push(`${message.content.ename}: ${message.content.evalue}`);
    });
}"""
# The kernel answers in turn: once it has run nothing, all that was sent before is done, and what it printed has arrived.
# Twice, because widgets hold back a move until the one before it is answered.
IDLE = """async limit => {
    const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
    const late = new Promise((_, fail) =>
        setTimeout(() => fail(new Error(`the kernel is still ${kernel.status} after ${limit} ms`)), limit));
    for (let round = 0; round < 2; round++) {
        await Promise.race([kernel.requestExecute({code: "", silent: true, store_history: false}).done, late]);
        await new Promise(go => setTimeout(go, 50));
    }
}"""
# The visible text of the outputs, block by block. Formulas are left out (MathJax writes its glyphs in its own time), and of
# a list only the choice counts. Not innerText of a copy: that would be slow enough to disturb what it measures.
TEXT = """scope => {
    const skip = "mjx-container, .MathJax, style, script, details:not([open]) > :not(summary)", parts = [];
    const judge = n => n.nodeType === 1 && (n.matches(skip) || n.parentNode.tagName === "SELECT") ? 2 : 1;
    let block = null;
    for (const area of document.querySelectorAll(scope + " .jp-OutputArea-output")) {
        if (area.parentElement.closest(".jp-OutputArea-output")) continue;
        const walker = document.createTreeWalker(area, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, judge);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            if (node.tagName === "SELECT") parts.push("\\n", (node.selectedOptions[0]?.text ?? "").replace(/\\s+/g, " "));
            else if (node.tagName === "INPUT" && node.checkVisibility()) parts.push("\\n", node.value);
            else if (node.tagName === "BR") parts.push("\\n");
            if (node.nodeType !== 3 || !node.data.trim() || !node.parentElement.checkVisibility()) continue;
            const here = node.parentElement.closest(":not(b, i, em, strong, code, span, small, a, sub, sup)");
            if (here !== block) parts.push("\\n");
            parts.push(node.data.replace(/\\s+/g, " "));
            block = here;
        }
    }
    return parts.join("").trim();
}"""
CONTENT = "selector => [...document.querySelectorAll(selector)].map(e => e.src ?? e.innerHTML)"
LOADED = "selector => [...document.querySelectorAll(selector)].every(e => !e.src || e.complete && e.naturalWidth > 300)"
CHANGED = "(before, after) => before.length === after.length && after.every((e, i) => e !== before[i])"
WATCH = f"""([scope, text, fresh, before]) => {{
    const shown = {TEXT}, content = {CONTENT}, loaded = {LOADED}, changed = {CHANGED}, start = performance.now();
    window.seen = null;
    const look = () => {{
        const done = shown(scope).includes(text) && (!fresh || changed(before, content(fresh)) && loaded(fresh));
        if (done) window.seen = (performance.now() - start) / 1000; else setTimeout(look, 10);
    }};
    look();
}}"""

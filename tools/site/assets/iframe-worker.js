// Search on pages opened from the disk, where browsers forbid workers: the worker's script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inner = frame.contentWindow
      this.loaded = new Promise(resolve => { frame.onload = resolve })
      addEventListener("message", event => {
        if (event.source !== this.inner) return
        const copy = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(copy)
        if (this.onmessage) this.onmessage(copy)
      })
      const page = this.inner.document
      page.open()
      page.write(`<script>postMessage = message => parent.dispatchEvent(
        new MessageEvent("message", { data: message, source: window }))<\/script><script src="${url}"><\/script>`)
      page.close()
    }
    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}

"""Text that wants to break a page: markup, characters of several bytes, control characters."""

HOSTILE = (
    "<script>alert(1)</script> </script><img src=x onerror=alert(1)> <!-- & &amp; \"q' `x` ]]> {{ 7 * 7 }}\n"
    "\tTab\r\n 😀👩‍👩‍👧‍👦🇫🇷 漢字かな交じり文。 العربية שלום \u202eevil\u202c \u2028line \x00\x07\x1b[31m ﷺ z͑ͫ 𝔘 \ufffd\n"
)

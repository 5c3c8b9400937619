"""How models decline to describe an image, in the languages that captioners are asked for most.

Patterns match at the very beginning, outside of quotation marks, and only with what is refused: a mug that says "I'm
sorry, I can't adult today" is no refusal, nor is a caption that ends by saying whom it cannot identify.
"""

import re


def refuses(text: str) -> bool:
    """Whether a cleaned text begins as a refusal does, in English, Spanish, French, German, Portuguese, Russian,
    Chinese or Japanese."""
    return _REFUSAL.match(text[:400].replace("’", "'")) is not None


def _any(*ways: str) -> str:
    return f"(?:{'|'.join(ways)})"


_DO = _any(
    *(
        "assist",
        "help (?:you|with)",
        "see",
        "view",
        "open",
        "access",
        "describe",
        "identify",
        "recogni[sz]e",
        "provide",
    ),
    *("process", "analy[sz]e", "interpret", "caption", "generate", "create", "comply", "fulfil+", "answer", "respond"),
    *("engage", "continue", "discuss", "determine", "display", "share (?:details|information)", "offer", "complete"),
    *("do that", "make (?:any )?(?:assumptions|identification)"),
)
_CANNOT = _any(" can(?:no|')?t", " can not", " could(?:n't| not)", " won't", " will not") + "(?: directly| actually)?"
_UNABLE = _any(" am", "'m") + "(?: currently| really)? (?:unable|not able) to(?: directly| actually)?"
_UNABLE = _any(_UNABLE, " (?:won't|will not) be able to")
_I_CANNOT = rf"i{_any(_CANNOT, _UNABLE)} {_DO}\b"
_PICTURE = _any("image", "picture", "photo")
_GIVEN = _any("provided", "attached", "uploaded", "included", "shared")
_NO_IMAGE = _any(
    rf"i (?:don't|do not) (?:actually )?see (?:an|any|the) {_PICTURE}",
    rf"(?:there|it) (?:is|seems|appears)[^.!?]{{0,60}}?\bno {_PICTURE} (?:was |has been )?(?:to describe|{_GIVEN})",
    rf"no {_PICTURE} (?:was|is|has been) {_GIVEN}",
    rf"please (?:upload|provide|share|attach|send) (?:me )?(?:the|an|your) {_PICTURE}",
    r"it (?:seems|looks|appears) (?:like |that |as (?:if|though) )?you "
    rf"[^.!?]{{0,30}}?n(?:'t|ot)\b[^.!?]{{0,30}}?{_PICTURE}",
)
_AS_AN_AI = r"as an? (?:ai|artificial intelligence|(?:large )?language model|text-based)\b[^.!?]{0,80}?,? i\b"
_SORRY = _any(
    r"(?:i(?:'m| am) |we(?:'re| are) )?(?:very |so |really |truly )?(?:sorry|afraid)",
    *("i apologi[sz]e", "my apologies", "apologies", "unfortunately", "regrettably"),
)
_ENGLISH = rf"(?:{_SORRY}\b[^.!?]{{0,60}}?[,.;:!—–-]? ?(?:but )?)?{_any(_AS_AN_AI, _I_CANNOT, _NO_IMAGE)}"

# The same in other languages: words of regret, which may be missing, then one of several ways to refuse. What one sees
# or opens has to be the image: a wall may say that it cannot see tomorrow.
_IM = r"(?:[^\W_]+ ){0,3}"  # up to three words before the image
_ELSEWHERE = {
    "es": (
        r"lo (?:siento|lamento)|disculp[ae]|perd[óo]n[ae]?|me temo|(?:desafortunada|lamentable)mente|por desgracia",
        r"(?:yo )?(?:actualmente )?no (?:(?:me |te |le )?puedo|podemos|me es posible|soy capaz de|"
        r"tengo la capacidad de|estoy (?:capacitad|autorizad)[oa] (?:para|a)) "
        r"(?:ayudar(?:te|le)?|asistir(?:te|le)?|describir|identificar|reconocer|proporcionar|ofrecer|generar|procesar|"
        r"analizar|interpretar|responder|cumplir|continuar|hacer eso|"
        rf"(?:ver|visualizar|abrir|acceder a) {_IM}(?:im[aá]gen|foto))",
        r"como (?:(?:un|una|soy un|soy una) )?(?:modelo de lenguaje|asistente|ia\b|inteligencia artificial)"
        r"[^.!?]{0,80}?\bno (?:puedo|tengo|soy capaz)",
        r"no veo ninguna (?:imagen|foto)|no (?:se )?h[ae]s? (?:proporcionado|adjuntado|subido|compartido|enviado) "
        rf"{_IM}(?:imagen|foto)",
        rf"por favor,? (?:sub[ea]|adjunt[ea]|proporcion[ea]|compart[ea]|env[ií][ea]) {_IM}(?:imagen|foto)",
    ),
    "fr": (
        r"(?:je suis )?(?:vraiment |sincèrement )?désolée?|je (?:m'excuse|regrette)|(?:toutes )?mes excuses|"
        r"excusez-moi|malheureusement",
        r"(?:je ne (?:peux|puis)(?: malheureusement)? pas|je ne suis (?:malheureusement )?pas (?:en mesure|capable) de|"
        r"il m'est impossible (?:de|d')) ?(?:vous |t'|y )?(?:aider|assister|décrire|identifier|reconnaître|fournir|"
        r"analyser|générer|traiter|interpréter|répondre|commenter|donner suite|faire (?:cela|ça)|"
        rf"(?:voir|visualiser|ouvrir|accéder à) {_IM}(?:l'|d')?(?:image|photo))",
        r"en tant qu(?:e |')(?:un |une )?(?:modèle|assistant|ia\b|intelligence artificielle)[^.!?]{0,80}?"
        r"\bje ne (?:peux|suis|dispose)",
        r"je ne vois (?:pas d'|aucune )(?:image|photo)|aucune (?:image|photo) n'a été (?:fournie|jointe|partagée|"
        r"téléchargée|téléversée)",
        rf"veuillez (?:télécharger|téléverser|fournir|joindre|partager|envoyer) {_IM}(?:l'|d')?(?:image|photo)",
    ),
    "de": (
        r"(?:es )?tut mir (?:sehr )?leid|entschuldigung|entschuldigen sie|(?:ich )?bedau[re]+e?|leider",
        r"(?:ich kann|kann ich) (?:[^\W_]+ ){0,6}?(?:nicht|keine?[nrms]?) (?:[^\W_]+ ){0,6}?(?:(?:weiter|be)?helfen|"
        r"behilflich|unterstützen|beschreiben|identifizieren|bereitstellen|analysieren|verarbeiten|interpretieren|"
        r"beantworten|erfüllen|erstellen|geben)\b",
        r"(?:ich kann|kann ich) (?:[^\W_]+ ){0,3}?(?:bild|foto)\w* (?:[^\W_]+ ){0,3}?nicht "
        r"(?:sehen|öffnen|anzeigen|erkennen)",
        r"(?:ich bin|bin ich)(?: leider)? nicht in der lage",
        r"als (?:ein |eine )?(?:ki\b|künstliche intelligenz|sprachmodell|textbasiert)[^.!?]{0,80}?"
        r"\b(?:ich|kann|bin)\b[^.!?]{0,60}?\b(?:nicht|keine)",
        r"ich sehe (?:hier |leider )?kein (?:bild|foto)|es wurde (?:leider )?kein (?:bild|foto)\w* [^\W_]*"
        r"(?:bereitgestellt|angehängt|hochgeladen|geteilt|übermittelt)",
        rf"bitte (?:laden sie|lade|stellen sie|fügen sie|senden sie) {_IM}(?:bild|foto)",
    ),
    "pt": (
        r"(?:me )?desculp(?:e|a|em)(?:-me)?|(?:eu )?(?:sinto muito|lamento)|perd[ãa]o|peço desculpas?|infelizmente",
        r"(?:eu )?não (?:(?:te |lhe |o )?(?:posso|consigo)|sou capaz de|tenho (?:a )?capacidade (?:de|para)|"
        r"estou autorizad[oa] a) (?:te |lhe |o |a )?(?:ajud(?:ar|á)|auxili(?:ar|á)|descrever|identificar|reconhecer|"
        r"fornecer|analisar|"
        r"processar|gerar|interpretar|responder|atender|cumprir|continuar|fazer isso|"
        rf"(?:ver|visualizar|abrir|acessar) {_IM}(?:image[mn]|foto))",
        r"como (?:(?:um|uma|sou um|sou uma) )?(?:modelo de linguagem|assistente|ia\b|inteligência artificial)"
        r"[^.!?]{0,80}?\bnão (?:posso|consigo|tenho|sou)",
        r"não vejo nenhuma (?:imagem|foto)|nenhuma (?:imagem|foto) foi (?:fornecida|anexada|enviada|compartilhada)",
        rf"por favor,? (?:envie|anexe|forneça|compartilhe|carregue) {_IM}(?:imagem|foto)",
    ),
    "ru": (
        r"извините|простите|прошу прощения|приношу (?:свои )?извинения|мне (?:очень )?жаль|(?:я )?сожалею|к сожалению",
        r"(?:я(?:,? к сожалению,?)? )?не (?:могу|смогу|в состоянии|имею возможности|способ(?:ен|на))(?: вам| тебе|"
        r" с этим|"
        r" в этом)* (?:помочь|описать|определить|идентифицировать|опознать|распознать|предоставить|обработать|"
        r"проанализировать|ответить|выполнить|создать|обсуждать|"
        rf"(?:видеть|увидеть|просматривать|просмотреть|открыть) {_IM}(?:изображени|картин|фото))",
        r"(?:как|я —|я -|я являюсь) (?:языков\w+ модел|искусственн\w+ интеллект|ии\b|нейросет)[^.!?]{0,80}?"
        r"\bне (?:могу|имею)",
        r"я не вижу (?:здесь |никакого |никакой )?(?:изображени|картин|фото)|изображени[ея] не было (?:предоставлено|"
        r"прикреплено|загружено)",
        rf"пожалуйста,? (?:загрузите|предоставьте|прикрепите|пришлите|отправьте) {_IM}(?:изображени|картин|фото)",
    ),
}
_HAN_SORRY = r"(?:我)?(?:非常|很|十分|真的)?(?:抱歉|对不起|對不起|不好意思|遗憾|遺憾)"
_HAN_NOT = r"(?:目前|暂时|暫時|现在|現在|并|並)?(?:还)?(?:无法|無法|不能够?|没办法|沒辦法|没有能力|不便)"
_HAN_DO = (
    r"(?:直接|[为為][您你]|[对對]此?|就此)?[^。！？，,]{0,14}?(?:描述|识别|識別|辨认|辨識|帮助|幫助|协助|協助|提供|"
    r"回答|"
    r"处理|處理|分析|满足|滿足|生成|解读|解讀|(?:查看|看到|看见|看見|访问|訪問|打开|打開)[^。！？，,]{0,8}?(?:图|圖|"
    r"照片))"
)
_SHOWN = r"[^。！？，,]{0,8}?(?:图|圖|照片)"
_JA_NOT = r"(?:でき|出来)(?:ません|ない)|(?:いた|致)?し?かねます"
_REFUSALS = (
    _ENGLISH,
    *(rf"(?:(?:{sorry})\b[^.!?]{{0,60}}?[,.;:!—–-]? ?)?(?<!\w){_any(*ways)}" for sorry, *ways in _ELSEWHERE.values()),
    # Chinese: "cannot be seen" without a person who says so, or regret, is said of things in images.
    rf"(?:{_HAN_SORRY}[^。！？]{{0,20}}?[，,。！!]? ?(?:但是?)?我?|我){_HAN_NOT}{_HAN_DO}",
    r"(?:我是|作为|作為)(?:一个|一個|一名|一款)?(?:人工智能|人工智慧|ai|(?:大型?|大)?[语語]言模型|文本)[^。！？]{0,40}?"
    r"(?:无法|無法|不能|没有|沒有)",
    rf"(?:{_HAN_SORRY}[，,。！!]? ?)?(?:但是?)?(?:[您你](?:似乎|好像)?(?:还|還)?(?:没有|沒有|并?未)"
    rf"(?:上传|上傳|提供|附上|发送|發送|分享)|我(?:没有|沒有)(?:看到|收到)|[请請]您?(?:重新)?(?:上传|上傳|提供|附上|"
    rf"发送|發送)){_SHOWN}",
    # Japanese: the verb comes last.
    r"(?:大変)?(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい|残念ながら|"
    r"恐れ入ります)。? ?[^。！？]{0,80}?"
    rf"(?:説明|描写|特定|識別|認識|提供|回答|お答え|お手伝い|対応|表示|処理|分析|判断|"
    rf"生成)[^。！？]{{0,14}}?(?:{_JA_NOT})",
    r"(?:私は|私には)?(?:この|その|提供された)?(?:画像|写真)(?:を|について|に関して|の内容を|の人物を)[^。！？]{0,12}?"
    rf"(?:説明|描写|特定|識別|処理|分析|表示|見る|閲覧)[^。！？]{{0,10}}?(?:{_JA_NOT})",
    r"私?は?、?(?:ai|人工知能|(?:大規模)?言語モデル)(?:アシスタント)?(?:である|として|なので|ですので|のため|です)"
    rf"[^。！？]{{0,60}}?(?:{_JA_NOT}|持っていません)",
    r"(?:申し訳ありませんが|すみませんが|恐れ入りますが)?、?画像(?:が(?:提供|添付|アップロード|共有)されて(?:い?ない|"
    r"い?ません)|"
    r"を(?:アップロード|提供|添付|共有|送信)して(?:ください|いただ))",
)
_REFUSAL = re.compile(_any(*_REFUSALS), re.IGNORECASE)

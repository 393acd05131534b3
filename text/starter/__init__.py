"""What the starter corpus is made of, data only: words (lexicon.py) and sentence frames, one file
for each sort of text.

    from text import starter
    starter.KINDS              # every kind of document; grammar.py fills its frames with the words

Frames are Hindi sentences in Devanagari with these marks:
    S  place  food2      Latin words are slots: a person (S F A B T), a noun of NOUNS or ADJECTIVES,
                         an activity (V W), a number of NUMBERS; a digit makes it another one of its
                         kind
    S.ne S.ko S.ka~x     forms: of a person ne ko se par ke ki ka; of a noun o (oblique) p (plural)
                         po; of an activity ta ya ga na ne (the verb forms), nta nya nga (with नहीं),
                         when, where
    अच्छा~x  गया=S         write the masculine singular: ~ agrees as adjective or participle, = as the
                         finite verb
    S/V  V.ya=V_S        the perfective: S takes ने if V is transitive, and then the verb agrees with
                         the object of V
    P  A1 A2 A3          the pronoun for S; the person A as मैं, तुम, आप; both and pair: S with F, A
                         with B
    [a|b|]               one of these;  ¶ a new line;  @kind,kind  one of these kinds is told here
A kind of document: name, weight in Devanagari, weight in Hinglish, cast (slot:pool,pool), and its
stages in order. `*` opens a stage and `?` one that may be left out; each line is one way to say it.
"""
from text.starter import days, dialogues, feelings, people, stories

# The corpus that train makes when there is no text: its folder, its length in characters, and the
# pieces of its own tokenizer.
FOLDER = "data/builtin"
CHARS = 12_000_000
VOCAB = 4000

# The order is part of every text: each document draws its kind from this list.
KINDS = people.KINDS + days.KINDS + feelings.KINDS + stories.KINDS + dialogues.KINDS

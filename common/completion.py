"""A shell script that lets the tab key complete the flags of every command, and their choices.

    text = script(commands, "bash")         # commands: {name: its class of flags}

Used by sample.py --completion. zsh reads the same script, as it knows bash's way of completing.
"""
import dataclasses

HEAD = {
    "bash": "# source <(python -m sample --completion bash)",
    "zsh": "# source <(python -m sample --completion zsh)\n"
    "autoload -U +X compinit bashcompinit && compinit -u && bashcompinit",
}
# COMP_WORDS and COMP_CWORD are the words of the line and the number of the one that is typed;
# bash cuts --flag=value in three words
BODY = """
_aria() {
  local typed=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} name="" number words=""
  for ((number = 1; number + 1 < COMP_CWORD; number++)); do
    if [[ ${COMP_WORDS[number]} == -m ]]; then name=${COMP_WORDS[number+1]}; break; fi
  done
  if [[ $typed == "=" ]]; then
    typed=""
  elif [[ $before == "=" ]]; then
    before=${COMP_WORDS[COMP_CWORD-2]}
  fi
  COMPREPLY=()
  if [[ $before == -m ]]; then
    words="@COMMANDS@"
  elif [[ $typed == -* ]]; then
    case $name in
@FLAGS@
    esac
  else
    case "$name ${before//-/_}" in
@CHOICES@
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$typed"))
}
complete -o bashdefault -o default -F _aria python python3
"""


def script(commands, shell):
    """The script for this shell, one of HEAD."""
    flags, choices = [], []
    for name, cls in commands.items():
        names = []
        for field in dataclasses.fields(cls):
            own = names_of(field)
            names += own
            values = field.metadata.get("choices")
            if values:
                cases = "|".join(f'"{name} {flag.replace("-", "_")}"' for flag in own)
                choices.append(f'      {cases}) words="{" ".join(values)}" ;;')
        flags.append(f'      {name}) words="{" ".join(names)}" ;;')
    body = BODY.replace("@COMMANDS@", " ".join(commands))
    body = body.replace("@FLAGS@", "\n".join(flags)).replace("@CHOICES@", "\n".join(choices))
    return HEAD[shell] + body


def names_of(field):
    """The names of a flag as they are typed."""
    names = [field.name, *field.metadata.get("aliases", ())]
    names += field.metadata.get("shortcuts", ())
    if field.type is bool and field.default:
        names.append(f"no_{field.name}")
    return [f"--{name}" for name in names]

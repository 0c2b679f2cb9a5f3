{{/* Labels of every object; give (dict "root" $ "component" NAME). */}}
{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: fednnunet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* What a pod is known by: the same in every version, so that an upgrade replaces no pod that did not change. */}}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* REPOSITORY:TAG, or REPOSITORY@DIGEST where a digest is given; (dict "root" $ "image" VALUES "gpu" BOOLEAN). */}}
{{- define "image" -}}
{{- with .image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default (printf "%s-%s" $.root.Chart.AppVersion ($.gpu | ternary "cuda" "cpu")) }}{{ end }}
{{- end -}}
{{- end }}

{{/* PodSecurity "restricted"; 10001 is the images' user, and owns what the volumes hold. */}}
{{- define "pod.security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "container.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod of this chart has in common at its end. */}}
{{- define "scheduling" -}}
nodeSelector:
  {{- toYaml .Values.nodeSelector | nindent 2 }}
tolerations:
  {{- toYaml .Values.tolerations | nindent 2 }}
imagePullSecrets:
  {{- toYaml .Values.imagePullSecrets | nindent 2 }}
priorityClassName: {{ .Values.priorityClassName | quote }}
{{- end }}

{{- define "state.claim" -}}
{{ .Values.state.existingClaim | default (printf "%s-state" .Release.Name) }}
{{- end }}

{{/* A role's own state, and the spool that both share; ROLE's part of the one volume; (dict "root" $ "role" ROLE). */}}
{{- define "state.mounts" -}}
{{- $base := "" }}{{ with .root.Values.state.subPath }}{{ $base = printf "%s/" . }}{{ end -}}
- name: state
  mountPath: /state
  subPath: {{ $base }}{{ .role }}
- name: state
  mountPath: /state/spool
  subPath: {{ $base }}spool
{{- end }}

{{- define "probes" -}}
startupProbe:
  exec:
    command: [appliance, health]
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 60
readinessProbe:
  exec:
    command: [appliance, health]
  periodSeconds: 30
  timeoutSeconds: 15
livenessProbe:
  # the supervisor looks after its processes; it starts again by itself what has ended
  exec:
    command: [appliance, health]
  periodSeconds: 30
  timeoutSeconds: 15
  failureThreshold: 6
{{- end }}
